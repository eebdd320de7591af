"""A training by several processes that one command starts."""

import os
import signal
import subprocess
import sys
import time

import pytest

from arcflow.commands import demo, train
from arcflow.config import Optim, Run
from arcflow.system import devices, files, launch, signals
from arcflow.system.processes import STORE

COMMAND = [sys.executable, "-m", "arcflow.cli", "train"]
SHORT = ["world", "--data.count", "32", "--data.held-out-count", "2", "--data.teacher-steps", "2", "--optim.batch", "4"]
SHORT += ["--optim.cooldown", "none", "--optim.cooldown-iterations", "0", "--pictures", "0"]


def python(*programs: str) -> list[subprocess.Popen]:
    return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]


def test_as_many_processes_as_cores_that_divide_a_batch(monkeypatch) -> None:
    for cores, batch, processes in ((1, 16, 1), (2, 16, 2), (3, 16, 2), (64, 16, 4), (8, 15, 3), (8, 7, 1)):
        monkeypatch.setattr(devices, "cores", lambda cores=cores: cores)
        assert demo.on_cores(batch) == processes


@pytest.mark.slow
def test_one_that_fails_ends_the_others_and_its_code_is_theirs(monkeypatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    processes = python("raise SystemExit(3)", "import time; time.sleep(60)")
    assert launch._wait(processes, []) == 3
    assert processes[1].wait() == -signal.SIGKILL


@pytest.mark.slow
def test_those_that_were_told_to_stop_are_given_their_time(monkeypatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.0)
    saving = "import signal, time; signal.signal(15, lambda *_: (time.sleep({}), exit(143))); time.sleep(60)"
    processes = python(saving.format(0), saving.format(1.0))
    time.sleep(0.7)  # until they listen
    assert launch._wait(processes, [signal.SIGTERM]) == 143
    assert [process.returncode for process in processes] == [143, 143]


@pytest.mark.slow
def test_a_process_ends_with_the_one_that_started_it(tmp_path) -> None:
    """A kill -9 of `train --processes 2` closes the pipes that it held, and nothing trains on without it."""
    works = "from arcflow.system.signals import end_with_parent; end_with_parent(); import time; time.sleep(60)"
    (tmp_path / "meeting").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", works],
        stdin=subprocess.PIPE,
        env={**os.environ, signals.LAUNCHED: str(tmp_path / "meeting")},
    )
    assert process.stdin and process.poll() is None
    process.stdin.close()
    assert process.wait(20) == -signal.SIGTERM and not (tmp_path / "meeting").exists()


def test_those_of_one_machine_meet_in_a_file_and_listen_to_nobody_else(tmp_path, monkeypatch) -> None:
    started: list[dict[str, str]] = []

    def start(words: list[str], env: dict[str, str], **more: object) -> subprocess.Popen:
        started.append(env)
        assert os.stat(os.path.dirname(env[STORE])).st_mode & 0o077 == 0
        return real([sys.executable, "-c", ""])

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    assert launch.run_together(["train", "world"], 2) == 0
    assert [env["RANK"] for env in started] == ["0", "1"] and not any("MASTER_PORT" in env for env in started)
    assert not os.path.exists(os.path.dirname(started[0][STORE]))


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match="a batch of 3 does not divide among 2 processes"):
        train.train_together(Run(out=str(tmp_path), optim=Optim(batch=3)), 2)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_stop_together(tmp_path) -> None:
    def losses(name: str) -> list[float]:
        return [line["loss"] for line in files.read_lines(tmp_path / name / "log.jsonl") if "loss" in line]

    def words(name: str, *more: str, save: int = 100) -> list[str]:
        return [*COMMAND, *more, *SHORT, "--save-every", str(save), "--out", str(tmp_path / name)]

    run = subprocess.Popen(
        words("two", "--processes", "2", save=2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until, checkpoints = time.monotonic() + 120, tmp_path / "two" / "checkpoints"
    while time.monotonic() < until and not (checkpoints / "00000002").is_dir():
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT, said
    assert "run the same command to go on" in said and "Traceback" not in said
    done = len(losses("two"))
    assert done >= 2 and (checkpoints / f"{done:08d}").is_dir()

    subprocess.run([*words("one"), "--stop-after", "1e-6"], check=True, capture_output=True)
    assert losses("one") == pytest.approx(losses("two")[:1], rel=1e-4)
