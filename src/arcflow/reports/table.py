"""A table, once: as text for a terminal, as Markdown for documents, and for the pages' template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mark = Literal["", "better", "worse", "differs"]


@dataclass(frozen=True)
class Cell:
    """What stands in a cell; a page shows its mark in color."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Line:
    """A row; one of ours is shaded, and bold in Markdown."""

    cells: Sequence[Cell]
    ours: bool = False

    @classmethod
    def of(cls, *cells: object, ours: bool = False) -> "Line":
        """A row of values as they print, some of them cells already."""
        return cls([cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in cells], ours)


@dataclass(frozen=True)
class Table:
    """A head and rows of as many cells."""

    head: Sequence[str]
    rows: Sequence[Line]

    def markdown(self) -> str:
        """The table in Markdown, as a document shows it."""
        lines = [_line(self.head), "|" + "---|" * len(self.head)]
        for row in self.rows:
            first, *others = [cell.text for cell in row.cells]
            lines.append(_line([f"**{first}**" if row.ours else first, *others]))
        return "\n".join(lines)

    def text(self) -> str:
        """The table as a terminal shows it: the first column to the left, numbers to the right."""
        rows = [list(self.head), *([cell.text for cell in row.cells] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def _line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|").replace("\u00b1", "&plusmn;") for cell in cells]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in escaped) + "|"
