"""Every error that a user can put right is a sentence: what, where, and what to do."""

import errno
import json
import os
import re

import httpx
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from arcflow import cli
from arcflow.system import files
from arcflow.system.errors import on_full_disk, sentence
from arcflow.system.owner import owned


def met(action):
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing went wrong")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/log.jsonl"), "no space left on the disk of runs/x"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk .*another folder with --out"),
        (SafetensorError('Error: Io(Os { message: "No space left on device" })'), "no space left on the disk"),
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), "/ro/x may not be read or written"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x may not .*change its permissions"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "no file or folder a/b: check the path"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "a is in the way"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "a"), "a cannot be read or written .Input/output error.: check the"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of memory on the device.*doctor --model NAME"),
        (MemoryError(), "out of memory on this machine"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory on this machine"),
        (RuntimeError("CUDA error: device-side assert triggered\nmore"), "the device failed"),
        (httpx.ConnectError("[Errno 111] Connection refused"), "gave no answer .*check the name, the connection"),
        (HFValidationError("Repo id must be ..."), "gave no answer"),
        (LocalEntryNotFoundError("not here"), "gave no answer"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "a connection broke off"),
        (ModuleNotFoundError("No module named 'x'"), "a package is missing .*arcflow doctor"),
        (met(lambda: json.loads('{"a": \n oh}')), "a JSON file is damaged .*line 2 column 2 .*near '{\"a\": oh}'"),
        (met(lambda: json.loads("[" * 100_000)), "nested too deeply"),
        (met(lambda: "\udcc3".encode()), "PYTHONUTF8=1"),
        (ValueError("our own\nin two lines"), "our own\nin two lines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_the_system_and_libraries_say_becomes_a_sentence(error, said):
    found = sentence(error) or ""
    assert re.search(said, found, re.DOTALL), found
    assert "\x1b" not in found


def test_a_mistake_of_ours_keeps_its_traceback():
    assert sentence(TypeError("unhashable")) is None and sentence(RuntimeError("mat1 and mat2")) is None


def test_control_characters_of_a_file_name_stay_off_the_terminal():
    assert "\x1b" not in (sentence(FileNotFoundError(errno.ENOENT, "no", "a\x1b]0;x")) or "")


def test_a_damaged_safetensors_file_is_told(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"cut")
    assert "damaged" in (sentence(met(lambda: load_file(tmp_path / "x.safetensors"))) or "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full here")
def test_a_disk_that_is_full_is_known(tmp_path):
    def fill():
        with open("/dev/full", "w") as file:
            file.write("x")

    assert on_full_disk(met(fill))

    def write_there():
        with owned(tmp_path / "out"):
            fill()

    assert f"no space left on the disk of {tmp_path / 'out'} " in (sentence(met(write_there)) or "")


@pytest.mark.parametrize("said", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error (os error 28)")])
def test_a_disk_that_is_full_is_told_by_what_was_written(said, tmp_path):
    """Neither the disk nor the library says it."""

    def write(draft):
        raise said

    told = sentence(met(lambda: files.write_atomic(tmp_path / "adapter", write))) or ""
    assert told.startswith(f"no space left on the disk of {tmp_path / 'adapter'} ") and not list(tmp_path.iterdir())


def test_of_a_copy_the_full_disk_is_where_it_goes():
    assert "of there " in (sentence(OSError(errno.ENOSPC, "No space left", "here", None, "there")) or "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "arcflow: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 1, "arcflow: no space left on the disk of out"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "arcflow: out of memory"),
    ],
)
def test_the_command_line_ends_with_one_line_and_a_code(error, code, said, monkeypatch, capsys):
    def run(self):
        raise error

    monkeypatch.setattr(cli.Claims, "run", run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["claims"])
    last = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(last) == 1 and last[0].startswith(said)


def test_a_mistake_of_ours_is_no_message(monkeypatch):
    monkeypatch.setattr(cli.Claims, "run", lambda self: {}["no"])
    with pytest.raises(KeyError):
        cli.main(["claims"])
