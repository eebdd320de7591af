"""A training by several processes that one command starts."""

import signal
import subprocess
import sys
import time

import pytest

from arcflow import together
from arcflow.commands import training
from arcflow.state import read_log

COMMAND = [sys.executable, "-m", "arcflow.cli", "train"]
SHORT = ["world", "--data.count", "32", "--data.held-out-count", "2", "--data.teacher-steps", "2", "--optim.batch", "4"]
SHORT += ["--optim.cooldown", "none", "--optim.cooldown-iterations", "0", "--pictures", "0"]


def python(*programs: str) -> list[subprocess.Popen]:
    return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]


def test_as_many_processes_as_cores_that_divide_a_batch(monkeypatch) -> None:
    for cores, batch, processes in ((1, 16, 1), (2, 16, 2), (3, 16, 2), (64, 16, 4), (8, 15, 3), (8, 7, 1)):
        monkeypatch.setattr(together, "cores", lambda cores=cores: cores)
        assert training.on_cores(batch) == processes


def test_one_that_fails_ends_the_others_and_its_code_is_theirs(monkeypatch) -> None:
    monkeypatch.setattr(together, "GRACE", 0.2)
    processes = python("raise SystemExit(3)", "import time; time.sleep(60)")
    assert together._wait(processes, []) == 3
    assert processes[1].wait() == -signal.SIGKILL


def test_those_that_were_told_to_stop_are_given_their_time(monkeypatch) -> None:
    monkeypatch.setattr(together, "GRACE", 0.0)
    saving = "import signal, time; signal.signal(15, lambda *_: (time.sleep({}), exit(143))); time.sleep(60)"
    processes = python(saving.format(0), saving.format(1.0))
    time.sleep(0.7)  # until they listen
    assert together._wait(processes, [signal.SIGTERM]) == 143
    assert [process.returncode for process in processes] == [143, 143]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_go_on_where_it_was_stopped(tmp_path) -> None:
    def losses(name: str) -> list[float]:
        return [line["loss"] for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line]

    def words(name: str, processes: int, iterations: int) -> list[str]:
        more = ["--out", str(tmp_path / name), "--optim.iterations", str(iterations)]
        return [*COMMAND, "--processes", str(processes), *SHORT, *more]

    for processes in (1, 2):
        subprocess.run(words(str(processes), processes, 3), check=True, capture_output=True)
    assert losses("2") == pytest.approx(losses("1"), rel=1e-4)

    run = subprocess.Popen(words("stopped", 2, 10_000), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until, log = time.monotonic() + 120, tmp_path / "stopped" / "log.jsonl"
    while time.monotonic() < until and not (log.exists() and len(log.read_text("utf-8").splitlines()) > 3):
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT, said
    assert "run the same command to go on" in said and "Traceback" not in said
    done = len(losses("stopped"))
    assert done >= 2 and (tmp_path / "stopped" / "checkpoints" / f"{done:08d}").is_dir()


@pytest.mark.slow
def test_what_is_wrong_is_told_once(tmp_path) -> None:
    words = [*COMMAND, "--processes", "2", *SHORT, "--optim.batch", "3", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("a batch of 3 does not divide among 2 processes") == 1
