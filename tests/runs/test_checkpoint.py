"""Checkpoints that are whole or passed over, and a run that goes on from them to the same bits."""

import concurrent.futures
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from arcflow.runs import checkpoint
from arcflow.runs.checkpoint import RECORD, Checkpoints, Progress, broken
from arcflow.system import files
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


@pytest.mark.parametrize(
    "name",
    ["a b", "ünï 実験 😀", "[lr=1e-4]", "100%"]
    + ([] if os.name == "nt" else ["a*b?", "#", "a::b", "~", "{}", "s3:x", "a\\b", "-dash", "x.tmp"]),
)
def test_a_folder_may_have_any_name(tmp_path, name, monkeypatch):
    """Libraries take some of these for patterns, addresses or options."""
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / name, Path(name) / "relative"):
        assert broken(saved(folder, 1) / "00000001") is None
        assert checkpoints(folder).restore().step == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


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


@pytest.fixture
def disk(monkeypatch):
    """A disk that fails as often as there are errors in the list: the next write of a record meets one."""
    errors, real = [], files.write_json

    def write_json(path, content):
        if errors:
            raise errors.pop()
        real(path, content)

    monkeypatch.setattr(files, "write_json", write_json)
    return errors


def test_a_write_that_fails_is_told_and_due_again_at_once(tmp_path, disk):
    said = []
    kept = checkpoints(tmp_path, log=said.append)
    kept.save(Progress(step=3))
    kept.settle()
    assert not kept.due() and not said

    disk.append(OSError(errno.EIO, "Input/output error"))
    kept.save(Progress(step=4))
    concurrent.futures.wait([kept.pending])
    assert kept.due() and names(tmp_path) == ["00000003"]
    assert re.search("checkpoint of iteration 4 .*Input/output error.*newest whole one is of iteration 3.*now", said[0])

    kept.save(Progress(step=5))
    kept.settle()
    assert not kept.due() and names(tmp_path) == ["00000003", "00000005"] and len(said) == 1
    kept.close()


def test_a_disk_that_stays_full_is_tried_again_at_growing_intervals(tmp_path, disk, monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    disk += [OSError(errno.ENOSPC, "No space left on device")] * 3
    kept = checkpoints(tmp_path, log=said.append)
    for step, waited in ((1, 0.0), (2, 10.0), (3, 30.0)):
        kept.save(Progress(step=step))
        kept.settle()
        assert kept.due() == (waited == 0)
        now[0] += waited
        assert kept.due()
    assert all("no space left on the disk" in one for one in said) and len(said) == 3
    kept.save(Progress(step=4))
    kept.close()
    assert names(tmp_path) == ["00000004"]


def test_the_last_checkpoint_is_tried_for_some_seconds_and_what_is_there_is_told(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "LAST_PAUSES", (0.0, 0.0))
    kept = checkpoints(tmp_path, log=lambda _: None)
    disk += [OSError(errno.EIO, "Input/output error")] * 2
    kept.finish(Progress(step=1))
    assert names(tmp_path) == ["00000001"]
    kept.finish(Progress(step=1))  # it is there
    disk += [OSError(errno.EIO, "Input/output error")] * 3
    with pytest.raises(
        ValueError, match="iteration 2 could not be saved .*newest whole one is of iteration 1.*goes on"
    ):
        kept.finish(Progress(step=2))
    kept.close()


def test_what_is_in_the_way_of_a_checkpoint_goes(tmp_path):
    for name in ("00000002", "00000002.tmp"):
        (tmp_path / name).write_text("in the way")
    assert broken(saved(tmp_path, 2) / "00000002") is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_damaged_checkpoints_neither_hide_nor_delete_new_ones(tmp_path, keep):
    for step in (6, 9, 12):
        saved(tmp_path, step, keep=keep)
    for path in list(tmp_path.iterdir())[-2:]:
        (file,) = path.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-10])
    first = checkpoints(tmp_path, log=lambda _: None).restore().step
    for step in range(first + 1, first + 4):
        kept = checkpoints(tmp_path, keep=keep, log=lambda _: None)
        assert kept.restore().step == step - 1
        kept.save(Progress(step=step))
        kept.close()
        assert broken(tmp_path / f"{step:08d}") is None
    whole = [name for name in names(tmp_path) if broken(tmp_path / name) is None]
    assert len(whole) >= keep if first else len(whole) == min(keep, 3)


def test_damaged_ones_go_when_the_run_has_passed_them(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "00000002" / RECORD).write_text("")
    kept = checkpoints(tmp_path, keep=2, log=lambda _: None)
    assert kept.restore().step == 1
    kept.save(Progress(step=3))
    kept.close()
    assert names(tmp_path) == ["00000001", "00000003"]


def edited(path, **changes):
    """A record with other entries, and a digest that fits them if it had one."""
    record = json.loads((path / RECORD).read_text())
    record["progress"] |= changes.pop("progress", {})
    (path / RECORD).write_text(json.dumps(record | changes))


@pytest.mark.parametrize("digest", [True, False], ids=["with a digest", "of before"])
@pytest.mark.parametrize(
    "changes",
    [
        {"progress": {"step": 3}},
        {"progress": {"flavor": 1}},
        {"progress": {"samples": "8"}},
        {"progress": {"skipped": -1}},
        {"progress": {"in_a_row": True}},
        {"progress": {"usual_norm": math.nan}},
        {"progress": {"usual_norm": 10**400}},
        {"progress": {"seconds": None}},
        {"progress": {"distance": [1]}},
        {"progress": {"data": []}},
        {"flavor": 1},
        {"files": []},
        {"files": {}},
        {"files": {"a": 1}},
        {"files": {"../a.safetensors": {"bytes": 1, "sha256": ""}}},
        {"files": {"a.safetensors": {"bytes": None, "sha256": ""}}},
        {"mark": 3},
    ],
    ids=str,
)
def test_an_odd_record_is_a_sentence_and_the_one_before_is_taken(tmp_path, changes, digest):
    newest = saved(tmp_path, 1, 2) / "00000002"
    if not digest:
        record = json.loads((newest / RECORD).read_text())
        del record["sha256"]
        (newest / RECORD).write_text(json.dumps(record))
        assert broken(newest) is None
    edited(newest, **dict(changes))
    said = []
    assert checkpoints(tmp_path, log=said.append).restore().step == 1
    assert len(said) == 1 and RECORD in said[0]


@pytest.mark.parametrize(
    "field", ["step", "samples", "skipped", "in_a_row", "usual_norm", "seconds", "distance", "data"]
)
def test_no_number_is_believed_that_was_not_written(tmp_path, field):
    kept = checkpoints(tmp_path)
    for step in (1, 2):
        kept.save(Progress(step=step, samples=8, skipped=1, usual_norm=1.5, seconds=3.0, distance=0.5, data={"a": 1}))
    kept.close()
    value = json.loads((tmp_path / "00000002" / RECORD).read_text())["progress"][field]
    edited(tmp_path / "00000002", progress={field: {"a": 2} if field == "data" else value + 1})
    assert checkpoints(tmp_path, log=lambda _: None).restore().step == 1


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"\0\0"]
)
def test_a_record_that_is_none_is_passed_over(tmp_path, text):
    (saved(tmp_path, 1, 2) / "00000002" / RECORD).write_bytes(text)
    assert checkpoints(tmp_path, log=lambda _: None).restore().step == 1


def test_an_older_checkpoint_under_a_newer_name_is_noticed(tmp_path):
    shutil.copytree(saved(tmp_path, 1) / "00000001", tmp_path / "00000009")
    assert "says iteration 1, but the folder is named 00000009" in (broken(tmp_path / "00000009") or "")
    assert checkpoints(tmp_path, log=lambda _: None).restore().step == 1


def test_strays_are_left_alone(tmp_path):
    newest = saved(tmp_path, 1, 2) / "00000002"
    (newest / "._x.safetensors").write_bytes(b"\0\5\x16\7")
    (newest / "x.safetensors").write_bytes(b"none of ours")
    for name in ("x.tmp", "00000007.tmp", "._00000002", "0000000x"):
        (tmp_path / name).touch()
    assert checkpoints(tmp_path, log=lambda _: None).restore().step == 2
    assert {"x.tmp", "00000007.tmp", "._00000002", "0000000x"} <= set(names(tmp_path))


def test_what_another_process_wrote_on_a_disk_of_its_own_is_missed_at_once(tmp_path, monkeypatch):
    said, real = [], dcp.HuggingFaceStorageReader.read_metadata

    def without_one(reader):
        metadata = real(reader)
        metadata.state_dict_metadata.pop("ema.b")
        return metadata

    monkeypatch.setattr(dcp.HuggingFaceStorageReader, "read_metadata", without_one)
    kept = checkpoints(tmp_path, log=said.append)
    kept.save(Progress(step=1))
    kept.settle()
    assert not names(tmp_path) and "on a disk that all of them see" in said[0]
    with pytest.raises(ValueError, match="could not be saved"):
        kept.close()


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
