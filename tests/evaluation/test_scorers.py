"""Scorers of others: a strange line costs that line, damage is asked for again, and nothing of them outlives us."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arcflow.evaluation import scorers


def answering(folder: Path, *answers: str) -> str:
    """A scorer that gives these answers, and then a right one for all that is asked."""
    (folder / "answers.txt").write_text("".join(f"{one}\n" for one in answers), "utf-8")
    (folder / "score.py").write_text(
        "import json, shutil, sys\n"
        "shutil.copyfile(sys.argv[3], sys.argv[2])\n"
        "with open(sys.argv[2], 'a') as out:\n"
        "    for line in open(sys.argv[1]):\n"
        "        out.write(json.dumps({'id': json.loads(line)['id'], 'score': 1.5}) + '\\n')\n"
    )
    words = [sys.executable, "-S", folder / "score.py", "{manifest}", "{out}", folder / "answers.txt"]
    return " ".join(str(word) if "{" in str(word) else shlex.quote(str(word)) for word in words)


def lines(*ids: str) -> list[scorers.ManifestLine]:
    return [scorers.ManifestLine(id=name, prompt="a", image="a.png", category="", suite="x", seed=0) for name in ids]


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        ('{"id": [1], "score": 1}', r"unknown id \[1\]"),
        ('{"id": {"a": 1}, "score": 1}', "unknown id"),
        ('{"id": "x/0", "score": ' + "9" * 400 + "}", "x/0 has the score 9999"),
        ('{"id": "x/0", "score": ' + "9" * 5000 + "}", "no JSON"),
        ('{"id": "x/0", "score": 1e400}', "x/0 has the score inf"),
        ("[" * 100_000, "no JSON"),
        ('{"id": "\\u001b[2Jx", "score": 1}', r"unknown id '\\x1b"),
    ],
)
def test_a_strange_line_costs_that_line_alone(strange, said, tmp_path) -> None:
    with pytest.raises(
        ValueError, match=f"1 answers of the scorer hps cannot be used .*line 1: {said}.*others are kept"
    ):
        scorers.run_scorer(tmp_path, "hps", answering(tmp_path, strange), lines("x/0", "x/1"))
    assert scorers.read_scores(tmp_path, "hps") == {"x/0": 1.5, "x/1": 1.5}
    assert scorers.run_scorer(tmp_path, "hps", "false {manifest} {out}", lines("x/0", "x/1")) == 0


def test_a_folder_in_the_place_of_the_answers_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="hps.out is a folder: expected what the scorer hps answers; remove it"):
        scorers.run_scorer(tmp_path, "hps", "mkdir {out}; cat {manifest}", lines("x/0"))


def test_damaged_scores_are_asked_for_again(tmp_path, capsys) -> None:
    scorers.run_scorer(tmp_path, "hps", answering(tmp_path), lines("x/0", "x/1", "x/2", "x/3"))
    store = tmp_path / "scores" / "hps.jsonl"
    first, second, third, _ = store.read_text().splitlines()
    damaged = [first.replace("1.5", "1.4"), second[:12], third, "\0" * 30]
    store.write_text("\n".join(damaged) + "\n")
    assert scorers.read_scores(tmp_path, "hps") == {"x/2": 1.5}
    assert scorers.run_scorer(tmp_path, "hps", answering(tmp_path), lines("x/0", "x/1", "x/2", "x/3")) == 3
    assert "hps.jsonl: 3 lines are damaged; their images are scored again" in capsys.readouterr().err
    assert scorers.read_scores(tmp_path, "hps") == {f"x/{i}": 1.5 for i in range(4)}
    store.write_text('{"id": "x/0", "score": 7}\n')  # as they were written before
    assert scorers.read_scores(tmp_path, "hps") == {"x/0": 7.0}


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_nothing_of_a_scorer_outlives_us(tmp_path) -> None:
    child = tmp_path / "pid"
    command = f"sleep 60 & echo $! > {shlex.quote(str(child))}; wait"

    def started() -> int:
        while not child.exists() or not child.read_text().strip():
            time.sleep(0.01)
        pid = int(child.read_text())
        child.unlink()
        return pid

    def interrupt(number, frame) -> None:
        raise KeyboardInterrupt

    # The user's signal.
    usual = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            scorers._run(command, tmp_path / "log")
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert gone(started())
    # Our own death, however it comes: the pipe ends.
    shell = subprocess.Popen(
        ["/bin/sh", "-c", scorers.WATCHED % command], stdin=subprocess.PIPE, start_new_session=True
    )
    pid = started()
    assert shell.stdin
    shell.stdin.close()
    assert gone(pid) and shell.wait(10)
    # What a command leaves behind when it ends.
    assert scorers._run(f"sleep 60 & echo $! > {shlex.quote(str(child))}; exit 3", tmp_path / "log") == 3
    assert gone(started())
    assert scorers._run("cat; echo done # a comment", tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == "done\n"


def test_records_are_plain_json_lines(tmp_path) -> None:
    scorers.run_scorer(tmp_path, "hps", answering(tmp_path), lines("x/0"))
    (record,) = map(json.loads, (tmp_path / "scores" / "hps.jsonl").read_text().splitlines())
    assert record["id"] == "x/0" and record["score"] == 1.5
