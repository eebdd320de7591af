"""Where the time of an iteration goes, by a clock that only the parts move."""

import pytest
import torch

from arcflow.system import timing
from arcflow.system.timing import Speed


@pytest.fixture
def clock(monkeypatch):
    """Called with seconds, it lets them pass."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds
        return seconds

    return passes


def test_shares_are_those_of_the_parts_and_the_rest_is_the_students(clock):
    timer = Speed(torch.device("cpu"))
    fetch, ask = timer.of("data", clock), timer.of("teacher", clock)
    for _ in range(2):
        assert fetch(1.0) == 1.0
        ask(2.0), ask(4.0)
        clock(3.0)
    line = timer.line(iterations=2, samples=40)
    shares = {name: line[f"{name}_share"] for name in ("data", "teacher", "student")}
    assert shares == pytest.approx({"data": 0.1, "teacher": 0.6, "student": 0.3})
    assert (line["seconds_per_iteration"], line["samples_per_second"]) == (10.0, 2.0)
    assert line["memory_gib"] > 0


def test_every_line_begins_anew(clock):
    timer = Speed(torch.device("cpu"))
    ask = timer.of("teacher", clock)
    ask(1.0)
    timer.line(1, 1)
    clock(4.0)
    assert timer.line(1, 1)["teacher_share"] == 0.0
