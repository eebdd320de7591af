"""Averages, checkpoints and logs that survive being interrupted at any moment."""

import copy
import json
import os

import pytest
import torch

from arcflow.state import Ema, Log, Progress, ema_beta, read_log, restore, save_checkpoint, write_atomic


def model(seed=0, width=3):
    torch.manual_seed(seed)
    parameters = {"a.weight": torch.nn.Parameter(torch.randn(2, width)), "b": torch.nn.Parameter(torch.randn(4))}
    groups = [{"params": [parameters["b"]], "peak": 1.0}, {"params": [parameters["a.weight"]], "peak": 0.1}]
    return parameters, Ema(parameters), torch.optim.AdamW(groups, lr=0.1)


def walk(parameters, ema, optimizer, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        ema.update(ema_beta(step, start=2))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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


def test_a_restored_run_goes_on_to_the_same_bits(tmp_path):
    whole = model()
    walk(*whole, range(8))
    half = model()
    walk(*half, range(5))
    save_checkpoint(tmp_path, Progress(step=5, samples=20, skipped=1, distance=0.5), *half)
    again = model(seed=1)
    progress = restore(tmp_path, *again)
    assert (progress.step, progress.samples, progress.skipped, progress.distance) == (5, 20, 1, 0.5)
    walk(*again, range(progress.step, 8))
    assert same(again[0].values(), whole[0].values())
    assert same(again[1].weights.values(), whole[1].weights.values())
    for one, other in zip(again[0].values(), whole[0].values(), strict=True):
        assert same(again[2].state[one].values(), whole[2].state[other].values())


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    state = model()
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, Progress(step=step), *state, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002.safetensors", "00000010.safetensors"]


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_half_written_checkpoint_is_named_and_passed_over(tmp_path, size):
    state, messages = model(), []
    save_checkpoint(tmp_path, Progress(step=1), *state)
    newest = save_checkpoint(tmp_path, Progress(step=2), *state)
    newest.write_bytes(newest.read_bytes()[:size])
    assert restore(tmp_path, *model(), log=messages.append).step == 1
    assert len(messages) == 1 and "skipping" in messages[0] and newest.name in messages[0]


@pytest.mark.parametrize("name", ["00000003.safetensors.tmp", ".tmpw5QT"])
def test_an_unfinished_temporary_file_is_removed(tmp_path, name):
    messages = []
    (tmp_path / name).write_bytes(b"half")
    assert restore(tmp_path, *model(), log=messages.append).step == 0
    assert "not finished" in messages[0] and not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    save_checkpoint(tmp_path, Progress(step=1), *model(width=5))
    with pytest.raises(ValueError, match=r"does not fit this student \(a.weight .*choose another run folder"):
        restore(tmp_path, *model())


def test_a_checkpoint_holds_no_pickle(tmp_path):
    parameters, ema, optimizer = model()
    walk(parameters, ema, optimizer, range(1))
    path = save_checkpoint(tmp_path, Progress(step=1), parameters, ema, optimizer)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert json.loads(header["__metadata__"]["progress"])["step"] == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_checkpoint_may_be_read_by_whom_the_user_lets(tmp_path):
    path = save_checkpoint(tmp_path, Progress(step=1), *model())
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomic(path, fail)
    assert path.read_text() == "old"


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    with Log(tmp_path, 0, log=lambda _: None) as log:
        for step in range(5):
            log.write(step, loss=step / 2)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    with Log(tmp_path, 3, log=lambda _: None) as log:
        log.write(4, loss=float("nan"))
    assert read_log(path) == [{"step": i, "loss": i / 2} for i in range(4)] + [{"step": 4, "loss": None}]
    with Log(tmp_path, 0, log=lambda _: None):
        assert path.read_text() == ""


def test_averages_hold_their_own_memory():
    parameters, ema, _ = model()
    before = copy.deepcopy(ema.weights)
    parameters["b"].data.zero_()
    assert torch.equal(ema.weights["b"], before["b"])
