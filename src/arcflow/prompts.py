"""Prompt lists, whatever they come in: text, JSON lines, CSV, parquet, or a `datasets` data set.

A list of millions always has some dirty rows. They are left out, counted and named by the place they stand at; nothing
stops because of them unless `strict` is asked for. What makes the whole list unusable (no such file, no such column,
no row left) is an error. Only `datasets` and parquet need the extra `arcflow[data]`.
"""

import copy
import csv
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from arcflow.config import PROMPT_FILES

LONGEST = 4000
"""Characters; a row beyond is not a prompt. Text encoders cut off far below."""
BLOCK = 8192
"""Rows of a stream that are shuffled among each other."""
MORE = ("height", "width", "image")
"""Columns that are read if they are there."""
NAMED = 3
"""Places that are named for each reason."""


class Row(NamedTuple):
    """One prompt, and the size of its picture where the list tells it."""

    text: str
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    image: str = ""
    """Path of a picture as the list gives it."""


class Raw(NamedTuple):
    """A row as it stands in the list. `wrong` says why it cannot even be read."""

    place: int
    text: Any = None
    height: Any = None
    width: Any = None
    image: Any = None
    wrong: str = ""


@dataclass
class Sieve:
    """Lets clean rows through; counts the others and remembers where the first of them stand."""

    where: str
    strict: bool = False
    unit: str = "line"
    total: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[int]] = field(default_factory=dict)

    def clean(self, rows: Iterable[Raw]) -> Iterator[Row]:
        """The rows that can be used.

        Raises:
            ValueError: one cannot, and `strict` is set.
        """
        for raw in rows:
            self.total += 1
            wrong = raw.wrong or _wrong(raw)
            if not wrong:
                size = None if raw.height is None else (int(raw.height), int(raw.width))
                yield Row(raw.text.strip(), size, raw.image if isinstance(raw.image, str) else "")
                continue
            if self.strict:
                raise ValueError(
                    f"{self.where}, {self.unit} {raw.place}: {wrong} ({str(raw.text)[:60]!r}), expected a prompt; "
                    f"correct the row, or leave such rows out with --data.no-strict"
                )
            self.counts[wrong] += 1
            self.places.setdefault(wrong, []).append(raw.place)
            del self.places[wrong][NAMED:]

    def message(self) -> str | None:
        """What was left out, in one line; None if nothing was."""
        if not self.counts:
            return None
        named = [
            f"{count} {wrong} ({self.unit} {', '.join(map(str, self.places[wrong]))}{' ...' * (count > NAMED)})"
            for wrong, count in self.counts.most_common()
        ]
        return f"{self.where}: {sum(self.counts.values())} of {self.total} rows left out: {'; '.join(named)}"


def _wrong(raw: Raw) -> str:
    """What is wrong with a row; empty if nothing is."""
    if not isinstance(raw.text, str):
        return "not text"
    if not raw.text.strip():
        return "empty"
    if len(raw.text) > LONGEST:
        return "over-long"
    if any("\ud800" <= letter <= "\udfff" or letter == "\ufffd" for letter in raw.text):
        return "wrong encoding"
    if (raw.height, raw.width) != (None, None):
        try:
            whole = int(raw.height) == float(raw.height) and int(raw.width) == float(raw.width)
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole or min(int(raw.height), int(raw.width)) < 1:
            return "no size"
    return ""


def read_prompts(path: str | Path, column: str = "prompt", *, strict: bool = False) -> tuple[list[Row], str | None]:
    """All usable prompts of a file, and what was left out.

    Args:
        path: .txt (one prompt a line), or .jsonl, .csv, .tsv or .parquet with the prompts in `column`, and heights and
            widths in pixels in columns of that name if there are any.
        strict: raise at the first row that cannot be used.

    Raises:
        ValueError: no such file, an unknown kind, no such column, no row left, or a dirty row and `strict`.
    """
    file = Path(path)
    if file.suffix not in PROMPT_FILES:
        raise ValueError(
            f"{path} is of a kind that is not read: expected {', '.join(PROMPT_FILES)}; rename or convert it"
        )
    if not file.is_file():
        raise ValueError(f"no prompt file {str(path)!r}: expected a {', '.join(PROMPT_FILES)} file; check the path")
    sieve = Sieve(str(path), strict, "row" if file.suffix == ".parquet" else "line")
    reader = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}.get(file.suffix, _csv)
    found = list(sieve.clean(reader(file, column)))
    if not found:
        raise ValueError(f"{sieve.message() or f'{path} is empty'}: expected prompts in it; fill or correct it")
    return found, sieve.message()


def _lines(file: Path) -> Iterator[tuple[int, str | None]]:
    """Numbered lines, None where one is not UTF-8; blank ones are no rows."""
    with file.open("rb") as stream:
        for place, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield place, line.decode("utf-8-sig" if place == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    yield place, None


def _text(file: Path, column: str) -> Iterator[Raw]:
    for place, line in _lines(file):
        yield Raw(place, line, wrong="" if line is not None else "wrong encoding")


def _json_lines(file: Path, column: str) -> Iterator[Raw]:
    for place, line in _lines(file):
        if line is None:
            yield Raw(place, wrong="wrong encoding")
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            yield Raw(place, line, wrong="not JSON")
            continue
        if isinstance(value, dict) and column in value:
            yield Raw(place, value[column], **_more(value))
        else:
            yield Raw(place, line, wrong=f"without {column!r}")


def _csv(file: Path, column: str) -> Iterator[Raw]:
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        table = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
        _need(column, list(table.fieldnames or []), file)
        for row in table:
            yield Raw(table.line_num, row[column], **_more(row))


def _parquet(file: Path, column: str) -> Iterator[Raw]:
    parquet = _extra("pyarrow.parquet")
    table = parquet.ParquetFile(file)
    _need(column, table.schema_arrow.names, file)
    wanted = [name for name in (column, *MORE) if name in table.schema_arrow.names]
    place = 0
    for batch in table.iter_batches(columns=wanted):
        for row in batch.to_pylist():
            place += 1
            yield Raw(place, row[column], **_more(row))


def _more(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) or None for name in MORE}


def _need(column: str, columns: list[str], where: object) -> None:
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}: expected one of {columns}; name it with --data.column")


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{name} is not here: install it with pip install "arcflow[data]"') from error


def buckets(height: int, width: int, step: int) -> list[tuple[int, int]]:
    """Picture sizes (height, width) of about the same area, from twice as high to twice as wide, in steps of `step`."""
    area = height * width
    sizes = {(height, width)}
    for short in range(step, min(height, width) + step, step):
        long = round(area / short / step) * step
        if short < long <= 2 * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest(size: tuple[int, int] | None, sizes: list[tuple[int, int]], usual: tuple[int, int]) -> tuple[int, int]:
    """The size whose shape is closest; the usual one where the list tells none."""
    if size is None:
        return usual
    return min(sizes, key=lambda s: (max(s[0] * size[1], s[1] * size[0]) / min(s[0] * size[1], s[1] * size[0]), s))


class Stream:
    """A data set that is read as it goes, block by block, and can be taken up where it was left.

    `name` is a folder of parquet, CSV or JSON files or a Hub id, read by `datasets` without being downloaded whole.
    Every process reads the same rows and takes its share of each batch, so the position does not depend on how many
    there are.
    """

    def __init__(self, name: str, split: str, column: str, *, block: int, strict: bool = False) -> None:
        datasets = _extra("datasets")
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
        _need(column, columns, name)
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
