"""Prompts of a data set that is read as it goes."""

import copy
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from huggingface_hub import HfFileSystem

from arcflow.data.prompts import ListedPrompt, Raw, Sieve, extra, need_extra
from arcflow.families.identity import files_digest
from arcflow.system.files import text_digest
from arcflow.system.text import Json

WAITS = (1.0, 5.0, 25.0, 125.0)
"""Seconds to wait for a connection that broke off, one after the other, before giving up."""

NETWORK = ("aiohttp", "fsspec", "httpcore", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3")
"""Packages whose errors say that a connection broke off, beside OSError."""


class Stream:
    """A data set that is read as it goes, block by block, and can be taken up where it was left.

    `name` is a folder of parquet, CSV or JSON files or a Hub id, read by `datasets` without being downloaded whole; of
    its columns only the prompts, sizes and frames. Every process reads the same rows and takes its share of each batch,
    so the position does not depend on how many there are.
    """

    def __init__(self, name: str, split: str, column: str, *, block: int, strict: bool = False) -> None:
        datasets = extra("datasets")
        if not Path(name).is_dir() and name.count("/") != 1:
            raise ValueError(f"no data set {name!r}: expected a folder or a Hub id (owner/name); check data.prompts")
        try:
            made = datasets.load_dataset_builder(name)
            rows = made.as_streaming_dataset(split=split)
            columns = rows.column_names or list(next(iter(rows.decode(False))))
        except Exception as error:
            raise ValueError(
                f"{name} (split {split!r}) cannot be read ({_said(error)}): expected a data set that `datasets` "
                f"streams; check the name, data.split and the connection"
            ) from error
        need_extra(column, columns, name)
        # Images that stand beside the prompts are neither fetched nor decoded.
        read = dict.fromkeys((column, "height", "width", "frames"))
        self.rows = rows.select_columns([one for one in read if one in columns])
        self.content = data_digest([str(path) for paths in (made.config.data_files or {}).values() for path in paths])
        """A digest of its files, whatever they are called; None where that cannot be told."""
        self.column, self.block = column, block
        self.sieve = Sieve(name, strict, "row")
        self.first = copy.deepcopy(self.rows.state_dict())
        self._go(0, 0, self.first)

    def next(self) -> list[ListedPrompt]:
        """The next block, in the data set's order; after the last one the first again, as another epoch.

        Raises:
            ValueError: there are no prompts, a dirty row where `strict` is set, or the data set cannot be read, after
                all waits for a broken connection. Then this stands where it stood.
        """
        before = self.state()
        sieve = copy.deepcopy(self.sieve)
        for wait in (*WAITS, None):
            try:
                return self._next()
            except _Broken as broken:
                if wait is None or not broken.connection:
                    self.load(before)
                    self.sieve = sieve
                    raise ValueError(
                        f"{self.sieve.where} cannot be read on after row {before['place']} ({_said(broken.error)}): "
                        f"check the data set and the connection; the same command goes on from there"
                    ) from broken.error
            time.sleep(wait)
            self.load(before)
            self.sieve = copy.deepcopy(sieve)
        raise AssertionError("the last wait is None")

    def _next(self) -> list[ListedPrompt]:
        for _ in range(2):
            while True:
                before = self.place
                found = list(self.sieve.clean(self._raw()))
                self._at = copy.deepcopy(self.rows.state_dict())
                if found:
                    return found
                if self.place == before:
                    break
            self._go(self.epoch + 1, 0, self.first)
        raise ValueError(f"{self.sieve.message() or f'{self.sieve.where} is empty'}: expected prompts in it")

    def _raw(self) -> Iterator[Raw]:
        rows = islice(self._reader, self.block)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise _Broken(error) from error
            if row is None:
                return
            self.place += 1
            told = {name: row.get(name) for name in ("height", "width", "frames")}
            yield Raw(self.place, row.get(self.column), **told)

    def _go(self, epoch: int, place: int, rows: Json) -> None:
        self.epoch, self.place = epoch, place
        self._at = rows  # `datasets` tells it only once a row is read
        self.rows.load_state_dict(copy.deepcopy(rows))
        self._reader = iter(self.rows)

    def state(self) -> dict[str, object]:
        """Where the next block begins; goes into JSON."""
        return {"epoch": self.epoch, "place": self.place, "rows": copy.deepcopy(self._at)}

    def load(self, state: Json) -> None:
        """Go on from there."""
        self._go(**state)


def data_digest(paths: Sequence[str]) -> str | None:
    """Tells data sets apart by the content of their files, of which none is read whole or fetched: those on the Hub
    have a digest there. None if one of them is somewhere else, or there are none."""
    found = list(map(_file_content, paths))
    return text_digest(sorted(map(str, found)), 16) if found and None not in found else None


def _file_content(path: str) -> str | None:
    if Path(path).is_file():
        return files_digest([Path(path)])
    if not path.startswith("hf://"):
        return None
    try:
        known = HfFileSystem().info(path)
    except Exception:  # a connection that is not there: what the files are is not known then
        return None
    stored = known.get("lfs") or {}
    return stored.get("sha256") or known.get("blob_id")


class _Broken(Exception):
    """Reading a row failed."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @property
    def connection(self) -> bool:
        """Whether it may go on by itself."""
        return isinstance(self.error, OSError) or type(self.error).__module__.partition(".")[0] in NETWORK


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
