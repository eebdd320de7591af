"""What ends a run before its time: everything up to then is saved, and the message says how to go on."""

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from arcflow.config import Data
from arcflow.data import stream
from arcflow.data.batches import open_prompts
from arcflow.runs import checkpoint
from arcflow.runs.checkpoint import RECORD, broken
from arcflow.system import files, signals
from arcflow.system.owner import owned
from arcflow.system.signals import Insisted, Stopped, stop_signals
from arcflow.training.learner import Learner
from arcflow.training.loop import train
from arcflow.training.validation import DistanceToTeacher
from tests.support.trainings import config, quiet, tiny_pipe

SMALL = Data(count=16, held_out_count=2, teacher_steps=2, height=8, width=8)
MANY = 10_000


def settings(folder, **changes):
    usual = {"data": SMALL, "pictures": 0, "save_every": 100, "eval_every": 100, "optim__iterations": 5}
    return config(folder, **{**usual, **changes})


def steps(folder):
    """Iterations of the whole checkpoints."""
    there = sorted((folder / "checkpoints").iterdir()) if (folder / "checkpoints").exists() else []
    return [int(path.name) for path in there if broken(path) is None]


def done(folder):
    """Iterations that the log has."""
    return [line["step"] for line in files.read_lines(folder / "log.jsonl") if "loss" in line]


def after(count, action):
    """A pipeline whose network does something before its call of that number."""
    pipe, calls = tiny_pipe(), iter(range(10**9))
    inner = pipe.transformer.forward

    def forward(*args, **kwargs):
        if next(calls) == count:
            action()
        return inner(*args, **kwargs)

    pipe.transformer.forward = forward
    return pipe


def fails(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is left by a run that nothing has happened to."""
    folder = train(settings(tmp_path_factory.mktemp("whole")), tiny_pipe(), quiet)
    return load_file(folder / "adapter" / "adapter.safetensors"), (folder / "log.jsonl").read_bytes()


def assert_goes_on_to(whole, folder, **changes):
    train(settings(folder, **changes), tiny_pipe(), quiet)
    adapter = load_file(folder / "adapter" / "adapter.safetensors")
    assert all(torch.equal(adapter[name], value) for name, value in whole[0].items())
    assert (folder / "log.jsonl").read_bytes() == whole[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_second_signal_while_the_last_checkpoint_is_written_loses_nothing(tmp_path, monkeypatch, number):
    """At once, and when the first is no longer the same."""
    number, real = signal.Signals[number], files.digest
    monkeypatch.setattr(signals, "PATIENCE", 0.0)

    def slow_disk(path):
        main = threading.main_thread().ident
        for _ in range(2):
            signal.pthread_kill(main, number)
            time.sleep(0.01)
        return real(path)

    def told():
        os.kill(os.getpid(), number)
        monkeypatch.setattr(signals, "PATIENCE", 60.0)
        monkeypatch.setattr(files, "digest", slow_disk)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name}, saved") as stop:
        train(settings(tmp_path, optim__iterations=MANY), after(30, told), quiet)
    monkeypatch.undo()
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    assert steps(tmp_path) == [done(tmp_path)[-1]]


def test_while_it_saves_a_run_takes_two_more_signals_to_leave(monkeypatch, capfd):
    monkeypatch.setattr(signals, "PATIENCE", 0.0)

    def insist():
        time.sleep(0.002)  # more than a clock's tick
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Insisted, match="SIGTERM") as left, stop_signals() as caught:
        caught.saving = True
        insist()
        insist()
        assert "once more to leave without it" in capfd.readouterr().err
        insist()
    assert left.value.code == 143


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as caught:
            signal.raise_signal(signal.SIGHUP)
            assert not caught
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_who_insists_leaves_the_iteration_and_the_one_before_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.0)

    def insist():
        for _ in range(2):
            time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGTERM)

    said = []
    with pytest.raises(Stopped) as stop:
        train(settings(tmp_path), after(40, insist), said.append)
    assert stop.value.code == 143 and steps(tmp_path) == [done(tmp_path)[-1]]
    assert "run the same command to go on" in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_machine_is_no_loss(tmp_path, whole, error):
    said = []
    with pytest.raises(type(error)):
        train(settings(tmp_path), after(40, fails(error)), said.append)
    assert steps(tmp_path) == [done(tmp_path)[-1]] != []
    assert f"iteration {steps(tmp_path)[-1]} of 5 is saved" in said[-1] and "run the same command" in said[-1]
    assert_goes_on_to(whole, tmp_path)


@pytest.mark.slow
def test_an_error_in_the_middle_of_a_step_keeps_the_checkpoint_before(tmp_path, whole, monkeypatch):
    """Some weights have moved and some have not: that is nothing to be saved."""
    real, said = Learner.update, []

    def half(learner, progress):
        if progress.step == 3:
            next(iter(learner.parameters.values())).data.add_(1)
            raise RuntimeError("the device is gone")
        return real(learner, progress)

    monkeypatch.setattr(Learner, "update", half)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(settings(tmp_path, save_every=2), tiny_pipe(), said.append)
    assert steps(tmp_path) == [2] and "iteration 2 of 5 is saved" in said[-1]
    monkeypatch.undo()
    assert_goes_on_to(whole, tmp_path)


@pytest.mark.slow
def test_a_measurement_that_fails_is_made_again_by_the_next_start(tmp_path, monkeypatch):
    real, calls = DistanceToTeacher.distance, []

    def short_of_memory(validation, walker):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(validation, walker)

    monkeypatch.setattr(DistanceToTeacher, "distance", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(settings(tmp_path / "a", eval_every=3), tiny_pipe(), quiet)
    assert steps(tmp_path / "a") == [3]
    monkeypatch.undo()
    for name in "ab":
        train(settings(tmp_path / name, eval_every=3), tiny_pipe(), quiet)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in "ab"]
    assert logs[0] == logs[1] and logs[0].count(b"distance") == 3


@pytest.mark.slow
def test_a_failed_write_is_told_at_once_and_tried_again(tmp_path, whole, monkeypatch):
    failures, real, said = [OSError(5, "Input/output error")], files.digest, []
    monkeypatch.setattr(files, "digest", lambda path: fails(failures.pop())() if failures else real(path))
    train(settings(tmp_path, save_every=2, keep=9), tiny_pipe(), said.append)
    told = [one for one in said if "could not write the checkpoint of iteration 2" in one]
    assert len(told) == 1 and "tries again now" in told[0]
    assert set(steps(tmp_path)) & {3, 4} and steps(tmp_path)[-1] == 5
    adapter = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert all(torch.equal(adapter[name], value) for name, value in whole[0].items())


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_in_a_sentence_and_the_run_goes_on_when_there_is_room(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(checkpoint, "LAST_PAUSES", (0.0,))
    train(settings(tmp_path, stop_after=1e-9), tiny_pipe(), quiet)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(files, "write_json", lambda path, _: fails(full)() if path.name == RECORD else None)
    with pytest.raises(ValueError, match="iteration 5 could not be saved .*no space left .*one is of iteration 1"):
        train(settings(tmp_path), tiny_pipe(), quiet)
    monkeypatch.undo()
    assert steps(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert_goes_on_to(whole, tmp_path)


def library(**names):
    module = ModuleType("wandb")
    vars(module).update(names)
    return module


def tracker(where):
    """A stand-in for wandb that fails there."""
    calls = []

    def log(values, step):
        calls.append(step)
        if where == "log" and len(calls) > 5:
            raise ConnectionError("Network is unreachable")

    run = SimpleNamespace(log=log, finish=fails(TimeoutError("no upload")) if where == "finish" else lambda: None)
    begin = fails(RuntimeError("timed out")) if where == "init" else lambda **_: run
    return library(init=begin, Image=lambda image: None)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_never_ends_a_run(tmp_path, whole, monkeypatch, where):
    said = []
    monkeypatch.setitem(sys.modules, "wandb", tracker(where))
    train(settings(tmp_path, tracker="wandb"), tiny_pipe(), said.append)
    assert sum("tracker wandb failed" in one for one in said) == 1
    assert (tmp_path / "log.jsonl").read_bytes() == whole[1] and (tmp_path / "adapter").is_dir()


def test_a_tracker_that_cannot_begin_names_its_setting(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", tracker("init"))
    with pytest.raises(ValueError, match="tracker = 'wandb' could not begin .*timed out.*--tracker none"):
        train(settings(tmp_path, tracker="wandb"), tiny_pipe(), quiet)


@pytest.mark.slow
def test_a_stream_that_breaks_off_is_saved_up_to_there(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    from arcflow.data import batches

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text("".join(json.dumps({"prompt": f"p {i}"}) + "\n" for i in range(40)))
    monkeypatch.setattr(batches, "BLOCK", 10)
    real, calls = stream.Stream.next, []

    def flaky(self):
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("Server disconnected")
        return real(self)

    data = dataclasses.replace(SMALL, prompts=str(tmp_path / "set"), cache=False)
    monkeypatch.setattr(stream.Stream, "next", flaky)
    said, iterations = [], {"optim__iterations": 9}
    with pytest.raises(ConnectionError):
        train(settings(tmp_path / "a", data=data, **iterations), tiny_pipe(), said.append)
    assert steps(tmp_path / "a") == [done(tmp_path / "a")[-1]] and "run the same command" in said[-1]
    monkeypatch.setattr(stream.Stream, "next", real)
    for name in "ab":
        train(settings(tmp_path / name, data=data, **iterations), tiny_pipe(), quiet)
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == (tmp_path / "b" / "log.jsonl").read_bytes()


@pytest.mark.slow
def test_a_broken_image_in_the_middle_costs_nothing_that_was_done(tmp_path):
    for i in range(24):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    rows = (json.dumps({"prompt": f"p {i}", "image": f"{i}.png"}) + "\n" for i in range(24))
    (tmp_path / "list.jsonl").write_text("".join(rows))
    data = dataclasses.replace(SMALL, prompts=str(tmp_path / "list.jsonl"), images=True)
    victim = open_prompts(data, seed=0, batch=4).batch(3).images[1]
    kept = Path(victim).read_bytes()
    Path(victim).write_bytes(kept[:40])
    run = settings(tmp_path / "run", data=data)
    for _ in range(2):
        with pytest.raises(ValueError, match=os.path.basename(victim)):
            train(run, tiny_pipe(), quiet)
        assert steps(tmp_path / "run") == [3] == done(tmp_path / "run")[-1:]
    Path(victim).write_bytes(kept)
    train(run, tiny_pipe(), quiet)
    assert done(tmp_path / "run") == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    with owned(tmp_path / "run", "trains"), pytest.raises(ValueError, match="run is in use, process .* trains there"):
        train(settings(tmp_path / "run"), tiny_pipe(), quiet)
    train(settings(tmp_path / "run", optim__iterations=1), tiny_pipe(), quiet)
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_run_that_loses_its_folder_stops_without_writing(tmp_path, monkeypatch):
    def taken(owner):
        raise ValueError("was taken over by process 7 on 'node8'")

    monkeypatch.setattr("arcflow.system.owner.Owner.check", taken)
    with pytest.raises(ValueError, match="taken over by process 7"):
        train(settings(tmp_path), tiny_pipe(), quiet)
    assert steps(tmp_path) == []


def nul(name):
    def damage(folder):
        with (folder / name).open("ab") as file:
            file.write(b"\0" * 9 + b"\n")

    return damage


def first_line(folder):
    text = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text("{oh\n" + text.partition("\n")[2])


def flipped(folder):
    path = folder / "held_out.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def stray(folder):
    (folder / "checkpoints" / "x.tmp").touch()
    for one in (folder / "checkpoints").glob("0*"):
        (one / "._a.safetensors").write_bytes(b"\0\5\x16\7")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (nul("log.jsonl"), None),
        (nul("speed.jsonl"), None),
        (first_line, "1 of 2 lines are left, some are missing or changed"),
        (lambda folder: (folder / "log.jsonl").unlink(), "0 of 2 lines are left"),
        (lambda folder: (folder / "held_out.safetensors").write_bytes(b"cut"), "ends are made again"),
        (flipped, "its SHA-256 differs.*ends are made again"),
        (stray, None),
    ],
    ids=["NULs in the log", "NULs in speed", "a line", "no log", "ends cut", "ends flipped", "strays"],
)
def test_what_is_damaged_beside_a_whole_checkpoint_keeps_no_run_from_going_on(tmp_path, whole, damage, told):
    train(settings(tmp_path, stop_after=1e-9), tiny_pipe(), quiet)
    damage(tmp_path)
    said = []
    train(settings(tmp_path), tiny_pipe(), said.append)
    adapter = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert all(torch.equal(adapter[name], value) for name, value in whole[0].items())
    assert any("resuming" in one for one in said)
    assert told is None or any(re.search(told, one) for one in said), said


@pytest.mark.slow
def test_a_damaged_run_json_is_named_with_the_way_out(tmp_path):
    train(settings(tmp_path, stop_after=1e-9), tiny_pipe(), quiet)
    for text in ("", "[]", "{", "[" * 100_000, '{"model": 3}', '{"oh": 1}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json is damaged .*checkpoints are untouched"):
            train(settings(tmp_path), tiny_pipe(), quiet)
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ValueError, match="run.json is damaged .*checkpoints are untouched"):
        train(settings(tmp_path), tiny_pipe(), quiet)
    (tmp_path / "run.json").rmdir()
    train(settings(tmp_path), tiny_pipe(), quiet)


@pytest.mark.slow
def test_what_failed_before_it_began_does_not_bind_the_corrected_command(tmp_path):
    wrong = settings(tmp_path / "run", model__base=str(tmp_path / "typo"), optim__iterations=1)
    with pytest.raises(ValueError, match="typo"):
        train(wrong, log=quiet)
    assert not (tmp_path / "run").exists()
    with pytest.raises(torch.OutOfMemoryError):
        train(wrong, after(0, fails(torch.OutOfMemoryError("too large"))), quiet)
    assert not (tmp_path / "run" / "run.json").exists()
    train(settings(tmp_path / "run", optim__iterations=1), tiny_pipe(), quiet)
