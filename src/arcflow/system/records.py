"""Results as frozen dataclasses, and the JSON of them: one reader and one writer for all.

A file that does not fit is an error that names the place, the key and what was expected there, so a misspelt key is
never taken for a number that is missing. Keys stand in the order of the fields. A field that has a default is left out
of the file where it has it.
"""

import dataclasses
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from arcflow.system import files

T = TypeVar("T")

ABSENT = dataclasses.MISSING

Kind = Any
"""A type as an annotation has it: a class, a union, a literal, a generic alias. They have no type in common."""


def read(kind: type[T], path: Path) -> T:
    """The record in a JSON file.

    Raises:
        ValueError: it is no JSON, or not such a record.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): expected results; make the file again") from error
    return record(kind, content, f"{path}: ")


def write(path: Path, value: object) -> None:
    """Write a record as JSON for people to read, whole or not at all."""
    files.write_json(path, plain(value))


def record(kind: type[T], content: object, where: str = "") -> T:
    """The record that some JSON is; `where` says in errors where that was found.

    Raises:
        ValueError: keys are unknown or missing, or a value is of another type than its field.
    """
    return cast(T, _built(kind, content, where))


def plain(value: object) -> object:
    """What `json.dumps` takes, of a record."""
    if dataclasses.is_dataclass(value):
        told = {one.name: (getattr(value, one.name), one.default) for one in dataclasses.fields(value)}
        return {name: plain(part) for name, (part, usual) in told.items() if usual is ABSENT or part != usual}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def _built(kind: Kind, content: object, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _fields(kind, content, where)
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _built(_closest(inside, content), content, where)
    if origin is dict and isinstance(content, dict):
        return {_key(inside[0], key, where): _built(inside[1], part, f"{where}{key}.") for key, part in content.items()}
    if origin is list and isinstance(content, list):
        return [_built(inside[0], part, f"{where}{place}.") for place, part in enumerate(content)]
    if origin is tuple and isinstance(content, list) and inside[1:] == (...,):
        return tuple(_built(inside[0], part, f"{where}{place}.") for place, part in enumerate(content))
    if origin is tuple and isinstance(content, list) and len(content) == len(inside):
        return tuple(_built(one, part, where) for one, part in zip(inside, content, strict=True))
    if origin is Literal and content in inside:
        return content
    if kind is float and type(content) is int:
        return float(content)
    if type(content) is not kind:
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(
            f"{where.removesuffix('.')} is {content!r:.60}; expected {expected}; correct it, or make the file again"
        )
    return content


def _fields(kind: Kind, content: object, where: str) -> object:
    if not isinstance(content, dict):
        raise ValueError(f"{where.removesuffix('.')} is {content!r:.60}; expected an object with {_names(kind)}")
    hints = _hints(kind)
    unknown = set(content) - set(hints)
    lacking = _required(kind) - set(content)
    if unknown or lacking:
        place = f"{where[:-1]}: " if where.endswith(".") else where
        raise ValueError(
            f"{place}unknown keys {sorted(unknown)}, missing keys {sorted(lacking)}; expected {_names(kind)}; "
            f"correct the file, or make it again"
        )
    return kind(**{name: _built(hints[name], part, f"{where}{name}.") for name, part in content.items()})


@cache
def _hints(kind: Kind) -> dict[str, Kind]:
    """Types of the fields by name; kept, for a file has thousands of records of a few kinds."""
    return get_type_hints(kind)


def _names(kind: Kind) -> str:
    return ", ".join(one.name for one in dataclasses.fields(kind))


def _required(kind: Kind) -> set[str]:
    return {one.name for one in dataclasses.fields(kind) if one.default is ABSENT and one.default_factory is ABSENT}


def _closest(kinds: Iterable[Kind], content: object) -> Kind:
    """The kind, among several, that a content is, or misses by the fewest keys."""
    if content is None and NoneType in kinds:
        return NoneType
    some = [kind for kind in kinds if kind is not NoneType]
    if not isinstance(content, dict):
        several = isinstance(content, list)
        return next((kind for kind in some if (get_origin(kind) in (list, tuple)) == several), some[0])

    def apart(kind: Kind) -> int:
        names = {one.name for one in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
        return len(set(content) - names) + len((_required(kind) if names else set()) - set(content))

    return min(some, key=apart)


def _key(kind: Kind, key: str, where: str) -> str | int:
    if kind is not int:
        return key
    if not key.isdecimal() or str(int(key)) != key:
        raise ValueError(
            f"{where}{key} is no whole number; expected one as the key; correct the file, or make it again"
        )
    return int(key)
