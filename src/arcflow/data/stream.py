"""Prompts of a data set that is read as it goes."""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from arcflow.data.prompts import Raw, Row, Sieve, extra, need_extra


class Stream:
    """A data set that is read as it goes, block by block, and can be taken up where it was left.

    `name` is a folder of parquet, CSV or JSON files or a Hub id, read by `datasets` without being downloaded whole.
    Every process reads the same rows and takes its share of each batch, so the position does not depend on how many
    there are.
    """

    def __init__(self, name: str, split: str, column: str, *, block: int, strict: bool = False) -> None:
        datasets = extra("datasets")
        if not Path(name).is_dir() and name.count("/") != 1:
            raise ValueError(f"no data set {name!r}: expected a folder or a Hub id (owner/name); check data.prompts")
        try:
            self.rows = datasets.load_dataset(name, split=split, streaming=True)
            columns = self.rows.column_names or list(next(iter(self.rows)))
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ValueError(
                f"{name} (split {split!r}) cannot be read ({why}): expected a data set that `datasets` streams; "
                f"check the name, data.split and the connection"
            ) from error
        need_extra(column, columns, name)
        self.column, self.block = column, block
        self.sieve = Sieve(name, strict, "row")
        self.epoch, self.place = 0, 0
        self.first = self.rows.state_dict()
        self._reader = iter(self.rows)

    def next(self) -> list[Row]:
        """The next block, in the data set's order; after the last one the first again, as another epoch."""
        for _ in range(2):
            while True:
                before = self.place
                if found := list(self.sieve.clean(self._raw())):
                    return found
                if self.place == before:
                    break
            self._go(self.epoch + 1, 0, self.first)
        raise ValueError(f"{self.sieve.message() or f'{self.sieve.where} is empty'}: expected prompts in it")

    def _raw(self) -> Iterator[Raw]:
        for row in islice(self._reader, self.block):
            self.place += 1
            yield Raw(self.place, row.get(self.column), row.get("height"), row.get("width"))

    def _go(self, epoch: int, place: int, rows: dict[str, Any]) -> None:
        self.epoch, self.place = epoch, place
        self.rows.load_state_dict(rows)
        self._reader = iter(self.rows)

    def state(self) -> dict[str, Any]:
        """Where the next block begins; goes into JSON."""
        return {"epoch": self.epoch, "place": self.place, "rows": copy.deepcopy(self.rows.state_dict())}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._go(**state)
