"""Prompt lists, whatever they come in: text, JSON lines, CSV, parquet, or a `datasets` data set.

A list of millions always has some dirty rows. They are left out, counted and named by the place they stand at; nothing
stops because of them unless `strict` is asked for. What makes the whole list unusable (no such file, no such column,
no row left) is an error. Only `datasets` and parquet need the extra `arcflow[data]`.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from arcflow.config import PROMPT_FILES
from arcflow.system.packages import need

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
        need_extra(column, list(table.fieldnames or []), file)
        for row in table:
            yield Raw(table.line_num, row[column], **_more(row))


def _parquet(file: Path, column: str) -> Iterator[Raw]:
    parquet = extra("pyarrow.parquet")
    table = parquet.ParquetFile(file)
    need_extra(column, table.schema_arrow.names, file)
    wanted = [name for name in (column, *MORE) if name in table.schema_arrow.names]
    place = 0
    for batch in table.iter_batches(columns=wanted):
        for row in batch.to_pylist():
            place += 1
            yield Raw(place, row[column], **_more(row))


def _more(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) or None for name in MORE}


def need_extra(column: str, columns: list[str], where: object) -> None:
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}: expected one of {columns}; name it with --data.column")


def extra(name: str) -> Any:
    """A module that reads data sets, imported; ValueError if it is not installed."""
    return need(name, asked="this list of prompts", install="arcflow[data]")
