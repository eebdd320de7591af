"""Prompt lists, whatever they come in: text, JSON lines, CSV, parquet, or a `datasets` data set.

A list of millions always has some dirty rows. They are left out, counted and named by the place they stand at; nothing
stops because of them unless `strict` is asked for. What makes the whole list unusable (no such file, no such column,
no row left) is an error. Text is UTF-8 or, as PowerShell and Notepad write it, UTF-16, with a mark or without. Only
`datasets` and parquet need the extra `arcflow[data]`.
"""

import codecs
import csv
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from PIL import Image

from arcflow.config import PROMPT_FILES, Sources
from arcflow.system.packages import need

LONGEST = 4000
"""Characters; a row beyond is not a prompt. Text encoders cut off far below."""

BLOCK = 8192
"""Rows of a stream that are shuffled among each other."""

MORE = ("height", "width", "frames", "image", "source")
"""Columns that are read if they are there."""

NAMED = 3
"""Places that are named for each reason."""

REACH = 1_000_000
"""Characters after which a quote of a CSV that nobody has closed is not waited for any longer."""

NO_TEXT = re.compile("[\\0\ud800-\udfff\ufffd]")
"""What bytes in another encoding become."""

BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
"""Letters and marks that show nothing, by no category of their own."""


class ListedPrompt(NamedTuple):
    """One prompt, and the size of its image where the list tells it."""

    text: str
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    image: str = ""
    """Path of an image as the list gives it."""
    frames: int | None = None
    """Frames of a video, where the list tells them."""
    source: str = ""
    """For an editing model: path of the image to edit as the list gives it, or words for it."""


class Raw(NamedTuple):
    """A row as it stands in the list. `wrong` says why it cannot even be read."""

    place: int
    text: Any = None
    height: Any = None
    width: Any = None
    image: Any = None
    frames: Any = None
    source: Any = None
    wrong: str = ""


@dataclass
class Sieve:
    """Lets clean rows through; counts the others and remembers where the first of them stand."""

    where: str
    strict: bool = False
    unit: str = "line"
    sources: Sources = "none"
    """What the column source must have."""
    total: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[int]] = field(default_factory=dict)

    def clean(self, rows: Iterable[Raw]) -> Iterator[ListedPrompt]:
        """The rows that can be used.

        Raises:
            ValueError: one cannot, and `strict` is set.
        """
        for raw in rows:
            self.total += 1
            wrong = raw.wrong or _wrong(raw) or _wrong_source(raw.source, self.sources, Path(self.where).parent)
            if not wrong:
                size = _size(raw.height, raw.width)
                frames = _frames(raw.frames)
                image = raw.image if isinstance(raw.image, str) else ""
                source = "" if self.sources == "none" else raw.source
                yield ListedPrompt(_stripped(raw.text), size, image, frames, source)
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
    if NO_TEXT.search(raw.text):
        return "wrong encoding"
    if not any(map(_visible, raw.text)):
        return "empty"
    if len(raw.text) > LONGEST:
        return "over-long"
    try:
        _size(raw.height, raw.width)
    except (TypeError, ValueError, OverflowError):
        return "no size"
    try:
        _frames(raw.frames)
    except (TypeError, ValueError, OverflowError):
        return "no number of frames"
    return ""


def _wrong_source(source: Any, sources: Sources, folder: Path) -> str:
    """What is wrong with a row's image to edit; empty if nothing is."""
    if sources == "none":
        return ""
    if not isinstance(source, str) or not source.strip():
        return "without an image to edit" if sources == "files" else "without words for an image to edit"
    if sources == "drawn":
        return ""
    if not (folder / source).is_file():
        return "whose image to edit is not there"
    try:
        with Image.open(folder / source):
            return ""
    except Exception:  # decoders raise whatever they like
        return "whose image to edit cannot be read"


def _visible(letter: str) -> bool:
    """Whether a letter shows anything: no space, no control, no mark of width zero."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Mn", "Zs", "Zl", "Zp") and letter not in BLANK


def _stripped(text: str) -> str:
    """Without the space around it, and without the mark that begins a file, which joined files have in the middle."""
    return text.strip().strip("\ufeff").strip()


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """Height and width in pixels; None where the list has a gap, which pandas writes as an empty cell or as NaN.

    Raises TypeError, ValueError or OverflowError if they are no size.
    """
    gaps = [value is None or (isinstance(value, float) and math.isnan(value)) for value in (height, width)]
    if all(gaps):
        return None
    size = tuple(float(value) for value in (height, width))
    if any(value < 1 or value != int(value) for value in size):
        raise ValueError("no whole pixels")
    return int(size[0]), int(size[1])


def _frames(value: Any) -> int | None:
    """Frames of a video; None where the list has a gap. Raises as `_size` does."""
    size = _size(value, value)
    return size and size[0]


def read_prompts(
    path: str | Path, column: str = "prompt", *, strict: bool = False, sources: Sources = "none"
) -> tuple[list[ListedPrompt], str | None]:
    """All usable prompts of a file, and what was left out.

    Args:
        path: .txt (one prompt a line), or .jsonl, .csv, .tsv or .parquet with the prompts in `column`, and heights and
            widths in pixels, and frames, in columns of that name if there are any.
        strict: raise at the first row that cannot be used.
        sources: what the column source must have: nothing, paths of images, relative to the file, or words.

    Raises:
        ValueError: no such file, an unknown kind, no such column, no row left, or a dirty row and `strict`.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in PROMPT_FILES:
        raise ValueError(
            f"{path} is of a kind that is not read: expected {', '.join(PROMPT_FILES)}; rename or convert it"
        )
    if not file.is_file():
        raise ValueError(f"no prompt file {str(path)!r}: expected a {', '.join(PROMPT_FILES)} file; check the path")
    sieve = Sieve(str(path), strict, "row" if suffix == ".parquet" else "line", sources)
    reader = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}.get(suffix, _csv)
    found = list(sieve.clean(reader(file, column)))
    if not found:
        raise ValueError(f"{sieve.message() or f'{path} is empty'}: expected prompts in it; fill or correct it")
    return found, sieve.message()


def encoding_of(file: Path) -> str:
    """How a file of text is written: UTF-8, with a mark or without, unless its first bytes say UTF-16 or UTF-32."""
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Without a mark: every Latin letter, space and line end of UTF-16 has a zero in its upper byte.
    zeros = [head[place::2].count(0) for place in (0, 1)]
    if max(zeros) >= len(head) / 20 and not min(zeros):
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return "utf-8-sig"


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a file of text, with the line ends of any system. Where bytes are no text, a line has lone
    surrogates or U+FFFD in their place."""
    encoding = encoding_of(file)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    with file.open(newline="", encoding=encoding, errors=errors) as stream:
        yield from stream


def _lines(file: Path) -> Iterator[tuple[int, str | None]]:
    """Numbered lines, None where one is in another encoding; blank ones are no rows."""
    for place, line in enumerate(lines_of(file), 1):
        if line.strip():
            yield place, line.strip() if _encodes(line) else None


def _encodes(line: str) -> bool:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text(file: Path, column: str) -> Iterator[Raw]:
    for place, line in _lines(file):
        yield Raw(place, line, wrong="" if line is not None else "wrong encoding")


def _json_lines(file: Path, column: str) -> Iterator[Raw]:
    for place, line in _lines(file):
        if line is None:
            yield Raw(place, wrong="wrong encoding")
            continue
        try:
            value = json.loads(line.lstrip("\ufeff"), parse_int=_whole)
        except (ValueError, RecursionError):
            yield Raw(place, line, wrong="not JSON")
            continue
        if isinstance(value, dict) and column in value:
            yield Raw(place, value[column], **_more(value))
        else:
            yield Raw(place, line, wrong=f"without {column!r}")


def _whole(digits: str) -> int | float:
    """A whole number of JSON; one too long for Python, which no prompt needs, is infinite."""
    return int(digits) if len(digits) < 400 else math.inf


def _csv(file: Path, column: str) -> Iterator[Raw]:
    """Rows of a table. A row whose quotes do not match is left out, and the next line is a row again: else one quote
    that nobody closes would swallow all that follows."""
    lines = list(lines_of(file))
    tabs = file.suffix.lower() == ".tsv"
    first = next((place for place, line in enumerate(lines) if line.strip("\ufeff \t\r\n")), len(lines))
    with _long_cells():
        names, at = _record(lines, first, tabs, None)
        if names is None:
            raise ValueError(f"{file}, line {first + 1}: its quotes do not match; expected the names of the columns")
        names = [name.strip("\ufeff") for name in names]
        need_extra(column, names, file)
        while at < len(lines):
            place = at + 1
            cells, at = _record(lines, at, tabs, len(names))
            if cells is None:
                yield Raw(place, lines[place - 1].strip(), wrong="quotes that do not match")
            elif cells:
                row = dict(zip(names, cells, strict=False))
                raw = Raw(place, row.get(column), **_more(row))
                yield raw
                # What a cell of over-long text has swallowed may be rows: they are counted as such.
                swallowed = range(place + 1, at + 1) if _wrong(raw) == "over-long" else ()
                yield from (Raw(line, lines[line - 1].strip(), wrong="inside an over-long cell") for line in swallowed)


def _record(lines: list[str], at: int, tabs: bool, width: int | None) -> tuple[list[str] | None, int]:
    """The cells of the row that begins in a line (none of a blank one), and where the next row begins. None if its
    quotes do not match; in a file with tabs such quotes are the text's own."""
    reader = csv.reader(_ahead(lines, at), delimiter="\t" if tabs else ",", strict=True)
    try:
        cells = next(reader, [])
        count = reader.line_num
    except csv.Error:
        cells, count = None, 1
    if cells is not None and count > 1:  # a quote that was closed lines later
        torn = width is not None and len(cells) != width
        if torn or (tabs and any("\t" in cell for cell in cells)):
            cells, count = None, 1
    if cells is None and tabs:
        cells = lines[at].rstrip("\r\n").split("\t")
    return cells, at + count


def _ahead(lines: list[str], at: int) -> Iterator[str]:
    """The lines that a row may take."""
    length = 0
    for place in range(at, len(lines)):
        yield lines[place]
        length += len(lines[place])
        if length > REACH:
            return


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let `csv` read cells of any length, which are then left out as rows, by their place."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(file: Path, column: str) -> Iterator[Raw]:
    """Rows of a parquet file. Only columns of text and numbers are read: images may stand beside them."""
    arrow, parquet = extra("pyarrow"), extra("pyarrow.parquet")
    place = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            need_extra(column, names, file)
            wanted = [name for name in (column, *MORE) if name in names and _short(arrow, table.schema_arrow, name)]
            if column not in wanted:
                kind = table.schema_arrow.field(column).type
                raise ValueError(
                    f"{file}: {column!r} has the type {kind}, expected text; name another with --data.column"
                )
            for batch in table.iter_batches(columns=wanted):
                for row in _row_dicts(batch):
                    place += 1
                    yield Raw(place, wrong="wrong encoding") if row is None else Raw(place, row[column], **_more(row))
    except (arrow.ArrowException, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read after row {place} ({why}): copy or fetch it again") from error


def _short(arrow: Any, schema: Any, name: str) -> bool:
    """Whether a column of a parquet file holds text or numbers."""
    kind = schema.field(name).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "integer", "floating", "null")
    return any(getattr(arrow.types, f"is_{test}")(kind) for test in tests if hasattr(arrow.types, f"is_{test}"))


def _row_dicts(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None where text is no UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # one by one, and nothing was given yet
        for place in range(batch.num_rows):
            try:
                yield batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _more(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) or None for name in MORE}


def need_extra(column: str, columns: list[str], where: object) -> None:
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}: expected one of {columns}; name it with --data.column")


def extra(name: str) -> ModuleType:
    """A module that reads data sets, imported; ValueError if it is not installed."""
    return need(name, asked="this list of prompts", install="arcflow[data]")
