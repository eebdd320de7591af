"""Checkpoints that are whole or passed over, and a run that goes on from them to the same bits."""

import json
import os

import pytest
from safetensors import safe_open

from arcflow.runs.checkpoint import RECORD, Checkpoints, Progress, broken
from tests.support.averages import model, same, walk


def checkpoints(folder, state=None, **more):
    return Checkpoints(folder, *(state or model()), log=more.pop("log", print), **more)


def saved(folder, *steps, state=None, **more):
    """Checkpoints at these steps, on the disk."""
    kept = checkpoints(folder, state, **more)
    for step in steps:
        kept.save(Progress(step=step))
    kept.close()
    return folder


def moments(state):
    parameters, _, optimizer = state
    return [optimizer.state[p][key] for p in parameters.values() for key in ("step", "exp_avg", "exp_avg_sq")]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_restored_run_goes_on_to_the_same_bits(tmp_path):
    whole = model()
    walk(*whole, range(8))
    half = model()
    walk(*half, range(5))
    before = checkpoints(tmp_path, half)
    before.save(Progress(step=5, samples=20, skipped=1, distance=0.5))
    walk(*half, range(5, 7))  # while it is written
    before.close()
    again = model(seed=1)
    progress = checkpoints(tmp_path, again).restore()
    assert (progress.step, progress.samples, progress.skipped, progress.distance) == (5, 20, 1, 0.5)
    walk(*again, range(progress.step, 8))
    assert same(again[0].values(), whole[0].values())
    assert same(again[1].weights.values(), whole[1].weights.values())
    assert same(moments(again), moments(whole))


def test_only_the_newest_are_kept_and_the_milestones(tmp_path):
    saved(tmp_path, 1, 2, 10, 11, 12, keep=2, milestones=5)
    assert names(tmp_path) == ["00000010", "00000011", "00000012"]


@pytest.mark.parametrize("harm", ["cut short", "changed", "removed", "no record", "half a record"])
def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path, harm):
    messages = []
    newest = saved(tmp_path, 1, 2) / "00000002"
    (file,) = newest.glob("*.safetensors")
    data = file.read_bytes()
    if harm == "cut short":
        file.write_bytes(data[:-1])
    elif harm == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "removed":
        file.unlink()
    elif harm == "no record":
        (newest / RECORD).unlink()
    else:
        (newest / RECORD).write_text('{"files"')
    assert broken(newest) and broken(tmp_path / "00000001") is None
    assert checkpoints(tmp_path, log=messages.append).restore().step == 1
    assert len(messages) == 1 and "skipping" in messages[0] and newest.name in messages[0]


def test_an_unfinished_checkpoint_is_removed(tmp_path):
    messages = []
    (tmp_path / "00000003.tmp").mkdir()
    (tmp_path / "00000003.tmp" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path, log=messages.append).restore().step == 0
    assert "not finished" in messages[0] and not list(tmp_path.iterdir())


def test_what_goes_wrong_while_writing_is_said_at_the_next_one(tmp_path):
    kept = checkpoints(tmp_path)
    kept.save(Progress(step=1))
    kept.wait()
    (tmp_path / "00000002").write_text("in the way")
    kept.save(Progress(step=2))
    with pytest.raises(OSError):
        kept.wait()


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    saved(tmp_path, 1, state=model(width=5))
    with pytest.raises(ValueError, match=r"does not fit this student \(a.weight .*choose another run folder"):
        checkpoints(tmp_path).restore()


def test_a_checkpoint_is_safetensors_and_json(tmp_path):
    state = model()
    walk(*state, range(1))
    folder = saved(tmp_path, 1, state=state) / "00000001"
    file, record = sorted(folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert json.loads(record.read_text())["progress"]["step"] == 1
    with safe_open(file, "pt") as tensors:
        assert "optimizer.exp_avg.a.weight" in tensors.keys()  # noqa: SIM118


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_checkpoint_may_be_read_by_whom_the_user_lets(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    folder = saved(tmp_path / "run", 1) / "00000001"
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}
