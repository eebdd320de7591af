"""When a training will end: told after ten iterations, and line by line where there is no terminal."""

import re
from datetime import datetime, timedelta

import pytest

from arcflow.training.pace import LEAST, TELL, Pace, told_hours, told_time


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(said: list[str], *, until: int, each: float, clock: Clock, **more) -> Pace:
    """A run whose iterations all take as long, but for the first, which takes ten times that."""
    settings = dict(iterations=1000, done=0, eval_every=100, gpus=0, lines=False)
    pace = Pace(said.append, clock=clock, **{**settings, **more})
    with pace.measurement():
        clock.now += 50
    for step in range(pace.done + 1, pace.done + until + 1):
        seconds = 10 * each if step == pace.done + 1 else each
        clock.now += seconds
        pace.iteration(step, seconds, {"loss": 0.5, "distance": 0.25})
    return pace


def test_after_ten_iterations_the_end_is_told_with_its_date_and_the_cost() -> None:
    said = list[str]()
    run(said, until=TELL - 1, each=36.0, clock=Clock(), gpus=8)
    assert not said
    pace = run(said, until=TELL + 5, each=36.0, clock=Clock(), gpus=8)
    (line,) = said
    left = 990 * 36 + 10 * 50
    assert pace.left(TELL) == pytest.approx(left)
    ends = datetime.strptime(re.findall(r"ends about (\S+ \S+),", line)[0], "%Y-%m-%d %H:%M")
    assert abs(ends - datetime.now() - timedelta(seconds=left)) < timedelta(minutes=2)
    assert "36 s an iteration" in line and "in 10 h 2 min" in line
    assert f"{told_hours(8 * (1000 * 36 + 10 * 50) / 3600)} GPU-hours in all on 8 GPUs" in line


def test_cores_have_no_gpu_hours_and_a_start_that_stops_before_the_end_says_so() -> None:
    said = list[str]()
    run(said, until=TELL, each=36.0, clock=Clock(), stop_after=60.0, done=500)
    assert "GPU" not in said[0] and "stops after 60 min, and the same command goes on" in said[0]
    run(said, until=TELL, each=0.1, clock=Clock(), stop_after=60.0)
    assert "stops after" not in said[1]


def test_off_a_terminal_there_is_a_line_now_and_then_and_about_two_hundred_in_all() -> None:
    said = list[str]()
    run(said, until=1000, each=1.0, clock=Clock(), lines=True)
    lines = [line for line in said if line.startswith("iteration ")]
    assert 20 <= len(lines) <= 1000 / LEAST + 5
    assert re.fullmatch(r"iteration \d+ of 1000: loss 0.5, distance 0.25; 1 s an iteration, ends about .*", lines[-1])
    said.clear()
    run(said, until=1000, each=600.0, clock=Clock(), lines=True)
    assert 150 <= len([line for line in said if line.startswith("iteration ")]) <= 250


def test_times_read_as_people_say_them() -> None:
    assert [told_time(x) for x in (7.2, 90.0, 7260.0, 1386000.0)] == [
        "7 s",
        "2 min",
        "2 h 1 min",
        "16 d 1 h",
    ]
    assert [told_hours(x) for x in (0.123, 9.99, 4700.4)] == ["0.12", "10", "4,700"]
