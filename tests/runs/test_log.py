"""Averages and logs that survive being interrupted at any moment."""

import copy

import pytest
import torch

from arcflow.runs.ema import ema_beta
from arcflow.runs.log import Log
from arcflow.system import files
from tests.support.averages import model, same, walk


def test_the_average_is_a_copy_until_it_starts():
    assert [ema_beta(i) for i in (0, 50, 99, 100)] == [0, 0, 0, 0]
    assert ema_beta(101) == 0.5**8
    assert ema_beta(9999) == pytest.approx((1 - 1 / 9900) ** 8)


def test_the_average_follows_its_rule():
    parameters, ema, _ = model()
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(6):
        for p in parameters.values():
            p.data += 1
        beta = ema_beta(step, start=2)
        ema.update(beta)
        expected = {n: beta * expected[n] + (1 - beta) * p.detach() for n, p in parameters.items()}
    assert all(torch.allclose(ema.weights[name], expected[name]) for name in expected)


def test_swapping_the_average_in_and_out_changes_nothing():
    parameters, ema, optimizer = model()
    walk(parameters, ema, optimizer, range(5))
    nets, averages = [p.detach().clone() for p in parameters.values()], [w.clone() for w in ema.weights.values()]
    assert not same(nets, averages)
    with ema.applied():
        assert same(parameters.values(), averages)
    assert same(parameters.values(), nets) and same(ema.weights.values(), averages)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        files.write_atomic(path, fail)
    assert path.read_text() == "old"


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    with Log(tmp_path, 0, log=lambda _: None) as log:
        for step in range(5):
            log.write(step, loss=step / 2)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with Log(tmp_path, 3, log=lambda _: None) as log:
        log.write(4, loss=float("nan"))
    assert files.read_lines(path) == [{"step": i, "loss": i / 2} for i in range(4)] + [{"step": 4, "loss": None}]
    with Log(tmp_path, 0, log=lambda _: None):
        assert path.read_text() == ""


def test_averages_hold_their_own_memory():
    parameters, ema, _ = model()
    before = copy.deepcopy(ema.weights)
    parameters["b"].data.zero_()
    assert torch.equal(ema.weights["b"], before["b"])
