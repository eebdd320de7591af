"""Serving and drawing on Ray as a user starts them, with workers that are killed meanwhile.

Ray's packages stand in a folder of their own (`make long` fills it), for nothing else here needs them.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import psutil
import pytest

from arcflow.sampling.shards import Shards

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray here: pip install 'arcflow[ray]'"),
]

CAPTION = "a red ring left of a blue square on white"


@contextmanager
def command(*words: object) -> Iterator[subprocess.Popen]:
    """A command of ours, ended with all that it has started, whatever happens."""
    line = [sys.executable, "-c", "from arcflow.cli import main; main()", *map(str, words)]
    path = os.pathsep.join(["src", *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        left = below(process)
        process.kill()
        process.communicate()
        for one in left:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass


def below(process: subprocess.Popen, word: str = "") -> list[psutil.Process]:
    """Processes that a command has started, those whose command line has a word in it."""
    try:
        return [one for one in psutil.Process(process.pid).children(recursive=True) if word in " ".join(one.cmdline())]
    except psutil.NoSuchProcess:
        return []


def address_of(process: subprocess.Popen) -> str:
    """Where a server says that it is ready."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("ready"):
            return line.split()[2]
    raise AssertionError("".join(said))


def test_a_replica_that_is_killed_loses_no_request():
    """Two replicas, one killed under load: the stock client has all its pictures. Then a full queue, and the end."""
    words = ("--port", 0, "--device", "cpu", "--max-waiting", 16, "--ray", "--workers", 2)
    with command("serve", *words) as process, ThreadPoolExecutor(40) as pool:
        address = address_of(process)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60) as client:
            drawn = [
                pool.submit(client.images.generate, prompt=CAPTION, extra_body={"seed": i, "num_inference_steps": 8})
                for i in range(24)
            ]
            time.sleep(0.3)
            replicas = below(process, "ServeReplica")
            assert len(replicas) == 2
            replicas[0].kill()
            drawn += [pool.submit(client.images.generate, prompt=CAPTION, extra_body={"seed": i}) for i in range(24)]
            assert [one.result().data[0].seed for one in drawn] == [*range(24), *range(24)]
            assert len(list(client.images.generate(prompt=CAPTION, stream=True, partial_images=1))) == 2

        def status(n: int) -> tuple[int, str | None]:
            body = {"prompt": CAPTION, "n": n, "num_inference_steps": 8}
            answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=60)
            return answer.status_code, answer.headers.get("retry-after")

        answers = list(pool.map(status, [6] * 40))
        assert {code for code, _ in answers} == {200, 429}
        assert all(after for code, after in answers if code == 429)
        last = pool.submit(status, 2)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert last.result()[0] in (200, 503)


@pytest.mark.parametrize("kind", ["parquet"])
def test_killed_workers_lose_and_double_nothing(tmp_path, kind):
    """A worker killed, then all of it; the same command goes on, and draws what is missing."""
    (tmp_path / "prompts.txt").write_text("".join(f"{CAPTION} {'on ' * i}\n" for i in range(24)))
    shards = Shards(str(tmp_path / "shards"), kind)
    words = ("--prompts", tmp_path / "prompts.txt", "--shards", tmp_path / "shards", "--shard-format", kind)
    words = ("sample", *words, "--steps", 20, "--per-shard", 2, "--device", "cpu", "--ray", "--workers", 2)

    def there(process: subprocess.Popen, count: int) -> None:
        while process.poll() is None and len(list((tmp_path / "shards").glob(f"*.{kind}"))) < count:
            time.sleep(0.05)
        assert process.poll() is None

    with command(*words) as process:
        there(process, 1)
        below(process, "MapWorker")[0].kill()
        there(process, 4)
    before = shards.keys()
    assert 8 <= len(before) < 24
    with command(*words) as process:
        said, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    assert f"new images: {24 - len(before)};" in said
    listed = [key for path in (tmp_path / "shards").glob(f"*.{kind}") for key in shards._read(str(path))]
    assert len(listed) == len(set(listed)) == 24


def test_a_suite_is_shared_out(tmp_path):
    words = ("--suite", "world", "--count", 6, "--steps", 1, "--out", tmp_path, "--device", "cpu")
    with command("evaluate", *words, "--ray", "--workers", 2) as process:
        said, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    assert "accuracy" in said and (tmp_path / "results.json").is_file()
    assert len(list((tmp_path / "pictures").glob("manifest-*-of-2.jsonl"))) == 2
