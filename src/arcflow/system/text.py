"""What comes from a file: an object of JSON, and what of a text may be shown on a terminal."""

import unicodedata
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
"""An object of JSON, of which its reader alone knows what it holds."""

CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what steers a terminal or hides in a line: escapes, marks of direction, line separators."""


def controls(text: str) -> bool:
    """Whether a text holds characters that steer a terminal or cannot be seen."""
    return any(unicodedata.category(letter) in CONTROLS for letter in text)


def shown(text: object, most: int = 200) -> str:
    """A text as it may stand in a message: control characters written out (`\\x1b`), and not longer than `most`."""
    whole = str(text)
    return printable(whole if len(whole) <= most else f"{whole[:most]}... ({len(whole)} characters)")


def printable(text: str, keep: str = "") -> str:
    """A text with every character that cannot be printed written out, but for those of `keep`."""
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


def few(names: Sequence[str], most: int = 8) -> str:
    """Some names as they may stand in a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more
