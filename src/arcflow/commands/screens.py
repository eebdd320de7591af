"""First screens of help: what a command does, the options that people touch first, lines to copy, and how to see all.

`arcflow sample --help` shows five of thirty-odd options; `arcflow sample --help-all` has every one. The words are those
of the commands' own fields, so that nothing is said twice.
"""

import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from arcflow import config
from arcflow.commands.cache import CacheMake
from arcflow.commands.examples import examples
from arcflow.commands.train import ABOUT_RECIPES, RECIPES, Train

TRAINING = ("--data.prompts", "--out", "--optim.iterations", "--optim.batch", "--model.base")

FIRST = {
    "sample": ("--prompt", "--model", "--adapter", "--steps", "--seed"),
    "evaluate": ("--model", "--adapter", "--prompts", "--suite", "--out"),
    "train": TRAINING,
    "cache make": ("--prompts", "--model", "--out", "--stored", "--column"),
    "serve": ("--model", "--adapter", "--host", "--port", "--api-key"),
    "compare": ("--quick", "--only", "--calls", "--trainings", "--out"),
    "export": ("--adapter", "--out", "--layout", "--model", "--push"),
}
"""By command with more options than a screen: those that people touch first."""

SUMMARY = "Few-step text-to-image: distill a flow-matching model so that two network calls draw what took fifty."
"""What the command line is for."""

ALL = "--help-all"
"""The option that shows every option."""

WIDTH = 100
"""Columns of a screen at most."""


def screen(words: list[str], commands: Mapping[str, type]) -> str | None:
    """The first screen of what a line asks help for; None if the whole help is one, or is asked for."""
    if not {"-h", "--help"} & set(words):
        return None
    name = words[0] if words and words[0] in commands else ""
    if not name:
        return _overview(commands)
    if name == "cache":
        name = " ".join(words[:2])
    if name not in FIRST:
        return None
    kind = CacheMake if name == "cache make" else commands[name]
    recipe = next((word for word in words[1:] if word in RECIPES), "") if name == "train" else ""
    told = ABOUT_RECIPES[recipe] if recipe else inspect.getdoc(kind) or ""
    lines = [f"usage: arcflow {name}{_operand(name, recipe)} [OPTIONS]", "", *_filled(told)]
    if name == "train" and not recipe:
        listed = f"RECIPE is one of {', '.join(RECIPES)}; `arcflow recipes` has their card, memory and GPU-hours."
        lines += ["", *_filled(listed)]
    lines += ["", "options that people touch first:"]
    for option in FIRST[name]:
        lines += _entry(*_option(kind, option, recipe), 24)
    asked = f"arcflow {name}{f' {recipe}' if recipe else _operand(name, recipe)}"
    return "\n".join([*lines, "", examples(name).rstrip(), f"All options: {asked} {ALL}"]) + "\n"


def _overview(commands: Mapping[str, type]) -> str:
    """What `arcflow --help` prints: a line for each command."""
    width = max(map(len, commands)) + 4
    lines = ["usage: arcflow COMMAND [OPTIONS]", ""]
    lines += _filled(SUMMARY)
    lines += ["", "commands:"]
    for name, kind in commands.items():
        lines += _entry(name, _sentence(inspect.getdoc(kind) or ""), width)
    shown = examples("").rstrip()
    told = f"arcflow COMMAND --help says more of one, {ALL} all of it; arcflow --version the version."
    return "\n".join([*lines, "", shown, "", *_filled(told)]) + "\n"


def _operand(name: str, recipe: str) -> str:
    if name != "train":
        return ""
    return f" {recipe}" if recipe else " RECIPE"


def _sentence(text: str) -> str:
    """The first sentence, on one line."""
    flat = " ".join(text.split())
    end = flat.find(". ")
    return flat if end < 0 else flat[: end + 1]


def _columns() -> int:
    return min(WIDTH, shutil.get_terminal_size().columns)


def _filled(text: str, indent: str = "") -> list[str]:
    flat = " ".join(text.split())
    return textwrap.wrap(flat, _columns(), initial_indent=indent, subsequent_indent=indent)


def _entry(head: str, text: str, width: int) -> list[str]:
    """A name and what it means beside it, below it where the name is long."""
    pad = " " * width
    body = _filled(text, " " * width)
    first = f"  {head}"
    if len(first) + 1 > width or not body:
        return [first, *body]
    return [first.ljust(width) + body[0][len(pad) :], *body[1:]]


def _option(kind: type, option: str, recipe: str) -> tuple[str, str]:
    """An option with the kind of its value, and what it means; its default is the recipe's where there is one, and
    none where one is still to be named."""
    path = option.removeprefix("--").replace("-", "_")
    owner, name = _found(kind, path)
    hint = get_type_hints(owner, include_extras=True)[name]
    given = _at(RECIPES[recipe], path) if recipe else None if kind is Train else _default(owner, name)
    usual = f" (default: {_plain(given)})" if _worth_saying(given) else ""
    meaning = documented(owner)[name] + usual
    return f"{option} {_metavar(hint)}".rstrip(), meaning


def _found(kind: type, path: str) -> tuple[type, str]:
    """The dataclass that has an option, and its field: by its path, by the name it is given, or in a group."""
    first, _, rest = path.partition(".")
    for one in dataclasses.fields(kind):
        hint = get_type_hints(kind, include_extras=True)[one.name]
        inner = _bare(hint)
        named = [name for part in _marks(hint) if (name := getattr(part, "name", None))]
        if not rest and (path in named or (one.name == path and not named)):
            return kind, one.name
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            try:
                return _found(inner, rest if one.name == first and rest else path)
            except LookupError:
                continue
    if kind is Train:
        return _found(config.Run, path)
    raise LookupError(path)


def _marks(hint: object) -> tuple[object, ...]:
    return hint.__metadata__ if get_origin(hint) is Annotated else ()  # type: ignore[attr-defined]


def _bare(hint: object) -> object:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _metavar(hint: object) -> str:
    """How the value of an option is shown."""
    for mark in _marks(hint):
        if told := getattr(mark, "metavar", None):
            return told if len(told) < 20 else "NAME"
    bare = _bare(hint)
    if get_origin(bare) in (Union, types.UnionType):
        return _metavar(next(one for one in get_args(bare) if one is not type(None)))
    if get_origin(bare) is tuple:
        return _metavar(get_args(bare)[0])
    if get_origin(bare) is Literal:
        return "NAME"
    return {bool: "", int: "INT", float: "FLOAT", Path: "PATH"}.get(bare, "TEXT")  # type: ignore[call-overload]


def _default(owner: type, name: str) -> object:
    (one,) = (one for one in dataclasses.fields(owner) if one.name == name)
    return None if one.default is dataclasses.MISSING else one.default


def _at(settings: Any, path: str) -> object:  # noqa: ANN401 - a run, or a part of one
    for name in path.split("."):
        settings = getattr(settings, name)
    return settings


def _worth_saying(value: object) -> bool:
    return value not in (None, "", (), False)


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@cache
def documented(kind: type) -> dict[str, str]:
    """The sentence under each field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    told = dict[str, str]()
    for before, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(before.target, ast.Name)
            told[before.target.id] = " ".join(str(after.value.value).split())
    return told
