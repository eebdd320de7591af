"""One owner at a time for a folder: a run, a cache, a folder of images.

    with owned(folder, "trains") as owner:      # ValueError if somebody else is in it, who is named
        ...
        owner.check()                           # ValueError if the folder was lost meanwhile, see below

Whoever is in a folder holds a lock on its file `.lock` and has written there who it is. The operating system takes the
lock from a process that ends, however it ends, so nothing has to be removed after a crash. On one machine, in all of
its containers, and on network disks that share such locks (NFS) this decides. Some disks keep the locks of every
machine apart (Lustre and NFS with local locks) or know none (some FUSE): there the owner touches the file every `BEAT`
seconds, and a machine that finds another one's name waits until the last sign of life is `SILENCE` seconds old.
"""

import errno
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict, cast

from arcflow.system.errors import on_full_disk

LOCK = ".lock"
"""Name of the file in an owned folder."""

BEAT = 5.0
"""Seconds between an owner's signs of life."""

SILENCE = 60.0
"""Seconds without one after which another machine's owner counts as gone."""


class OwnerNote(TypedDict):
    """What an owner writes of itself."""

    pid: int
    host: str
    machine: str
    """What tells machines apart, and starts of one."""
    work: str
    command: str
    since: str
    token: str
    """What no other owner has."""


class Owner:
    """A process that has a folder to itself."""

    def __init__(self, folder: Path, handle: int, record: OwnerNote) -> None:
        self.folder = folder
        self.handle = handle
        self.record = record
        self.taken_by: OwnerNote | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    @property
    def token(self) -> str:
        """What no other owner has."""
        return self.record["token"]

    def check(self) -> None:
        """Raise ValueError if another process has taken the folder, which it does only if this one was still for
        `SILENCE` seconds, on a disk that does not share locks."""
        if self.taken_by:
            raise ValueError(
                f"{self.folder} was taken over by {_name(self.taken_by)} while this process gave no sign of life: "
                f"expected to be alone there; one of the two must end, and the other goes on"
            )

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(OSError):  # a disk that is away for a while
                os.utime(self.folder / LOCK)
                there = read_owner(self.folder)
                if there and there["token"] != self.token:
                    self.taken_by = there


@contextmanager
def owned(folder: Path, work: str = "works", *, remedy: str = "choose another folder with --out") -> Iterator[Owner]:
    """Keep a folder, which is made if need be, to this process while the block runs.

    Args:
        work: what the owner does there, for the one who is refused: "trains", "makes embeddings".
        remedy: what the one who is refused can do instead of waiting.

    Raises:
        ValueError: another process is in it; the message names process, machine and command.
    """
    made = _make(folder)
    try:
        owner = _take(folder, work, remedy)
    except BaseException:
        _unmake(made)
        raise
    owner.thread.start()
    try:
        yield owner
    except OSError as error:
        if on_full_disk(error) and error.filename is None:  # a file that is written line by line does not say which
            error.filename = str(folder)
        raise
    finally:
        owner.ended.set()
        owner.thread.join()
        if owner.taken_by is None:
            with suppress(OSError):  # Windows removes no open file
                (folder / LOCK).unlink()
        os.close(owner.handle)
        with suppress(OSError):
            if os.name == "nt" and owner.taken_by is None:
                (folder / LOCK).unlink()
        _unmake(made)


@contextmanager
def owned_share(folder: Path, share: tuple[int, int], work: str) -> Iterator[None]:
    """Keep a folder to this process, or of several that share the work, (number, count) each, this one's part of it.

    Raises:
        ValueError: another process does the same work there.
    """
    rank, ranks = share
    if ranks > 1:
        with owned(folder / f"part-{rank}-of-{ranks}", work):
            yield
        return
    for part in folder.glob("part-*-of-*"):  # of killed processes; refused if one is at work
        with owned(part, work):
            pass
        with suppress(OSError):
            part.rmdir()
    with owned(folder, work):
        yield


def read_owner(folder: Path) -> OwnerNote | None:
    """Who has written its name into a folder: `pid`, `host`, `machine`, `work`, `command`, `since` and `token`."""
    try:
        record = json.loads((folder / LOCK).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = isinstance(record, dict) and all(isinstance(record.get(k), str) for k in ("host", "machine", "token"))
    return cast(OwnerNote, record) if named else None


def _take(folder: Path, work: str, remedy: str) -> Owner:
    handle = _open(folder, work, remedy)
    try:
        there = read_owner(folder)
        locks = _lock(handle) is not None
        if there and (there["machine"] != _machine() or not locks):
            _await_silence(folder, there, work, remedy)
        record: OwnerNote = {
            "pid": os.getpid(),
            "host": platform.node(),
            "machine": _machine(),
            "work": work,
            "command": " ".join(sys.argv)[:200],
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": secrets.token_hex(8),
        }
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, json.dumps(record).encode())
        os.fsync(handle)
        if not locks:  # of two that come in the same moment the last to write stays
            time.sleep(1.0)
            last = read_owner(folder)
            if last and last["token"] != record["token"]:
                raise _refusal(folder, last, work, remedy)
        return Owner(folder, handle, record)
    except BaseException:
        os.close(handle)
        raise


def _open(folder: Path, work: str, remedy: str) -> int:
    """The lock file, locked. An owner that ends removes it, so it must still be there once it is locked."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        handle = os.open(folder / LOCK, flags, 0o666)
        if _lock(handle) is False:
            there = read_owner(folder)
            os.close(handle)
            raise _refusal(folder, there, work, remedy)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                return handle
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether this process has the lock now; None on a disk that knows no locks."""
    try:
        if os.name == "nt":
            import msvcrt  # of Windows alone

            os.lseek(handle, 1 << 20, os.SEEK_SET)  # what is locked there cannot be read by others
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl  # of every other system

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _await_silence(folder: Path, there: OwnerNote, work: str, remedy: str) -> None:
    """Wait until another machine's owner has given no sign of life for long enough; refuse if it gives one."""
    last, age = _sign(folder), _age(folder)
    if age < SILENCE:
        print(f"{folder}: {_name(there)} was here {age:.0f} s ago; waiting for a sign of life", file=sys.stderr)
    until = time.monotonic() + max(0.0, SILENCE - age)
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT))
        if _sign(folder) != last:
            raise _refusal(folder, there, work, remedy)


def _sign(folder: Path) -> int:
    return os.stat(folder / LOCK).st_mtime_ns


def _age(folder: Path) -> float:
    """Seconds since the owner's last sign of life, by the clock of the disk."""
    probe = folder / f"{LOCK}.{secrets.token_hex(4)}.tmp"
    try:
        probe.touch()
        return max(0.0, (os.stat(probe).st_mtime_ns - _sign(folder)) / 1e9)
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """What tells machines apart, and starts of one: inside, locks and process numbers mean something."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return platform.node()


def _name(record: OwnerNote) -> str:
    return f"process {record.get('pid')} on {record['host']!r} (since {record.get('since')}: {record.get('command')!r})"


def _refusal(folder: Path, there: OwnerNote | None, work: str, remedy: str) -> ValueError:
    who = f"{_name(there)} {there.get('work', work)} there" if there else f"another process {work} there"
    return ValueError(f"{folder} is in use, {who}: expected to be alone; wait until it has ended, or {remedy}")


def _make(folder: Path) -> list[Path]:
    """Make a folder; those that were not there before, from the innermost."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} cannot be a folder, a file is in the way: choose another place") from error
    return made


def _unmake(made: list[Path]) -> None:
    """Remove them as far as they are empty: nobody has left anything there."""
    with suppress(OSError):
        for path in made:
            path.rmdir()
