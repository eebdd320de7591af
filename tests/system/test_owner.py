"""One owner for a folder: the second is refused by name, a dead one keeps nothing."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from arcflow.system import owner
from arcflow.system.owner import LOCK, owned, read_owner


def stay(folder, ready):
    with owned(folder, "trains"):
        ready.set()
        time.sleep(60)


def test_a_folder_that_is_in_use_is_refused_by_name_and_left_alone(tmp_path):
    with owned(tmp_path / "run", "trains") as first:
        before = (tmp_path / "run" / LOCK).read_bytes()
        with pytest.raises(ValueError, match=rf"run is in use, process {os.getpid()} on .* trains there.*--out"):
            with owned(tmp_path / "run", "makes embeddings"):
                pass
        assert (tmp_path / "run" / LOCK).read_bytes() == before
        first.check()


def test_nothing_is_left_where_nothing_was_done(tmp_path):
    with owned(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
def test_a_killed_owner_keeps_nothing(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=stay, args=(tmp_path, ready))
    process.start()
    assert ready.wait(10)
    with pytest.raises(ValueError, match=f"process {process.pid}"), owned(tmp_path):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert (tmp_path / LOCK).exists()
    with owned(tmp_path):
        assert (read_owner(tmp_path) or {})["pid"] == os.getpid()


@pytest.fixture
def another_machine(tmp_path, monkeypatch):
    """A folder in which an owner on another machine has written its name; its lock is not seen here."""
    monkeypatch.setattr(owner, "BEAT", 0.05)
    monkeypatch.setattr(owner, "SILENCE", 0.4)
    record = {"pid": 1, "host": "node7", "machine": "another", "token": "0"}
    (tmp_path / LOCK).write_text(json.dumps(record))
    return tmp_path


def test_another_machines_owner_is_heard_where_locks_are_not_shared(another_machine, monkeypatch):
    signs = iter(range(1000))
    monkeypatch.setattr(owner, "_sign", lambda folder: next(signs))
    monkeypatch.setattr(owner, "_age", lambda folder: 0.0)
    with pytest.raises(ValueError, match="process 1 on 'node7'"), owned(another_machine):
        pass
    assert (read_owner(another_machine) or {})["host"] == "node7"


def test_another_machines_owner_that_is_silent_is_gone(another_machine, capsys):
    with owned(another_machine):
        assert (read_owner(another_machine) or {})["pid"] == os.getpid()
    assert "waiting for a sign of life" in capsys.readouterr().err
    (another_machine / LOCK).write_text(json.dumps({"pid": 1, "host": "node7", "machine": "another", "token": "0"}))
    os.utime(another_machine / LOCK, (0, 0))
    with owned(another_machine):
        pass
    assert "waiting" not in capsys.readouterr().err


def test_an_owner_notices_that_the_folder_was_taken_from_it(another_machine):
    (another_machine / LOCK).unlink()
    with owned(another_machine, "trains") as first:
        taken = {"pid": 2, "host": "node8", "machine": "another", "token": "1"}
        (another_machine / LOCK).write_text(json.dumps(taken))
        first.thread.join(0.3)
        with pytest.raises(ValueError, match="taken over by process 2 on 'node8'"):
            first.check()
    assert (read_owner(another_machine) or {})["pid"] == 2


def test_a_disk_without_locks_has_one_owner_too(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_lock", lambda handle: None)
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(owner, "SILENCE", 0.2)
    with owned(tmp_path):
        signs = iter(range(1000))
        monkeypatch.setattr(owner, "_sign", lambda folder: next(signs))
        monkeypatch.setattr(owner, "_age", lambda folder: 0.0)
        with pytest.raises(ValueError, match="is in use"), owned(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[1]", b'{"pid": 1}', b"[" * 10000])
def test_a_damaged_lock_file_keeps_nobody_out(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with owned(tmp_path):
        pass


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be a folder, a file is in the way"), owned(folder):
            pass
