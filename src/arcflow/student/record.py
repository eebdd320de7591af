"""The record of an adapter: all that its tensors do not say, each field with a type and a range.

A record comes from whoever made the adapter, so nothing in it is believed before it is checked: its size, its JSON (no
name twice), every field's type and range, no control characters anywhere. What is wrong is one ValueError that names
the field, the value and what was expected. A record may carry a SHA-256 for the tensor file beside it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from arcflow.config import Form, Targets
from arcflow.path import SHIFT, step_grid
from arcflow.system.text import controls, shown

LARGEST = 1 << 20
"""Bytes of the largest record that is read; those of this package have some ten thousand."""

FREE = ("base", "teacher_lora", "fingerprint", "versions", "training", "sha256")
"""Fields that do not decide what an adapter draws: they may be edited beside a checksum."""


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter's tensors do not say. Fields marked * are filled in by `save_adapter` from the student."""

    base: str = ""
    """* Where the base came from: a Hub id or a path."""
    family: str = ""
    """* Row of `families.FAMILIES`."""
    modes: int = 0
    """* K."""
    pixels: int = 4
    """* Latent pixels per token, P."""
    rank: int = 0
    """* Rank of the LoRA; 0 for none."""
    alpha: float = 0.0
    """* LoRA scale times rank."""
    targets: Targets = "feed_forward"
    """* Which Linears carry the LoRA."""
    form: Form = "mixture"
    """* What a call describes: the paper's mixture, or a path in coefficients."""
    shift: float = SHIFT
    """Shift between raw time and noise level the student was trained with."""
    steps: int = 2
    """Number of steps it was trained for."""
    also_steps: tuple[int, ...] = ()
    """Others that it was trained for too."""
    final_step_scale: float = 1.0
    """Length of the last step over the others."""
    guidance: float | None = None
    """Guidance embedding it was trained with, of a range what to draw with by default; None: the family's."""
    guidance_range: tuple[float, float] | None = None
    """Lowest and highest guidance embedding it was trained with; None of a number alone."""
    teacher_lora: str | None = None
    """A LoRA that was part of the teacher: the pipeline needs it too, before this adapter."""
    sizes: dict[str, object] = field(default_factory=dict)
    """* The base's sizes (`Family.sizes`)."""
    fingerprint: list[float] = field(default_factory=list)
    """* Some weights of the base's last layer, to tell it from another of the same sizes; empty: not known."""
    versions: dict[str, str] = field(default_factory=dict)
    """* Versions of the packages that wrote it."""
    training: dict[str, Any] = field(default_factory=dict)
    """Record of the training: config, progress, whatever its maker wants to keep."""
    sha256: dict[str, str] = field(default_factory=dict)
    """* SHA-256 of the tensor file, by its name; empty: not known."""

    @property
    def guidances(self) -> tuple[float, float] | None:
        """The lowest and the highest guidance that it was trained with; None where it is not known."""
        return self.guidance_range or (None if self.guidance is None else (self.guidance, self.guidance))

    @property
    def fewest(self) -> int:
        """The least number of steps that it was trained for."""
        return min((self.steps, *self.also_steps))

    @property
    def grids(self) -> tuple[tuple[float, ...], ...]:
        """Noise levels of the student's own steps, for each number of steps that it was trained for."""
        counts = (self.steps, *self.also_steps)
        return tuple(tuple(step_grid(n, self.shift, self.final_step_scale).tolist()) for n in counts)


def record_content(info: AdapterInfo) -> dict[str, object]:
    """What a record's file holds. A range of guidance that an adapter has not is left out, so that a record which knows
    of none is what it was before there were any, digests included."""
    content = dataclasses.asdict(info)
    if info.guidance_range is None:
        del content["guidance_range"]
    return content


def read_unchecked(path: Path) -> dict[str, object]:
    """The JSON object in a record's file, its fields not yet checked.

    Raises:
        ValueError: it is too large, no JSON, no object, or says something twice.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(
            f"{path} has {size} bytes; expected a record of at most {LARGEST}. The file is damaged or none of ours: "
            f"fetch or save it again."
        )
    return parse_record(path.read_bytes(), path)


def parse_record(text: bytes | str, path: Path) -> dict[str, object]:
    """The JSON object that a text holds; `path` is where it was found."""
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({shown(error)}). The file is damaged: fetch or save it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object. Fetch or save it again.")
    return content


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return content


def info_of(content: Mapping[str, object], path: Path) -> AdapterInfo:
    """The record that a file's content makes, every field checked.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of range.
    """
    known = {one.name for one in dataclasses.fields(AdapterInfo)}
    lacking = [name for name in ("family", "modes", "rank") if name not in content]
    if lacking or not set(content) <= known:
        raise ValueError(
            f"{path} is not a record this version of arcflow reads: missing {lacking}, unknown "
            f"{[shown(name, 40) for name in sorted(set(content) - known)][:8]}. Was it written by a newer arcflow? "
            f"Upgrade, or save the adapter again."
        )
    for name, value in content.items():
        fits, expected = KINDS[name]
        if not fits(value):
            raise ValueError(
                f"{path} says {name} = {shown(repr(value))}; expected {expected}. The file was changed or damaged, or "
                f"written by a newer arcflow: upgrade, or fetch or save it again."
            )
    return AdapterInfo(**{name: _as_declared(name, value) for name, value in content.items()})


def _as_declared(name: str, value: Any) -> Any:
    """A checked value in the type of its field, where JSON has another: 3 for 3.0, and lists alone."""
    if name in ("alpha", "shift", "final_step_scale", "guidance"):
        return None if value is None else float(value)
    if name == "fingerprint":
        return [float(one) for one in value]
    if name == "guidance_range":
        return None if value is None else tuple(float(end) for end in value)
    return tuple(value) if name == "also_steps" else value


def agree(told: AdapterInfo, own: AdapterInfo, path: Path, weights: Path) -> None:
    """Refuse a record that says other things than the tensor file it vouches for.

    Raises:
        ValueError: they differ in what decides the images.
    """
    for one in dataclasses.fields(AdapterInfo):
        here, there = getattr(told, one.name), getattr(own, one.name)
        if one.name not in FREE and here != there:
            raise ValueError(
                f"{path} says {one.name} = {shown(repr(here))}, but {weights.name} was saved with "
                f"{shown(repr(there))}. The file was changed or damaged: fetch or save it again. If the change is "
                f"meant, take the entry `sha256` out of {path.name}."
            )


Check = tuple[Callable[[object], bool], str]
"""(whether a value of a record is right, what is expected, in words)"""


def _whole(least: int, most: int) -> Check:
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"


def _number(least: float, most: float, *, above: bool = False) -> Check:
    def fits(value: object) -> bool:
        if type(value) is not int and type(value) is not float:
            return False
        if not abs(value) <= most:  # not a number is never at most
            return False
        return least < value if above else least <= value

    return fits, f"a finite number {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}"


def _text(most: int) -> Check:
    def fits(value: object) -> bool:
        return type(value) is str and len(value) <= most and not controls(value)

    return fits, f"a text of at most {most} characters, without control characters"


def _or_null(check: Check) -> Check:
    fits, expected = check
    return lambda value: value is None or fits(value), f"null or {expected}"


def _list(check: Check, most: int) -> Check:
    fits, expected = check

    def all_fit(value: object) -> bool:
        return type(value) is list and len(value) <= most and all(map(fits, value))

    return all_fit, f"a list of at most {most}, each {expected}"


def _object(check: Check, most: int) -> Check:
    named, _ = _text(100)
    fits, expected = check

    def all_fit(value: object) -> bool:
        return type(value) is dict and len(value) <= most and all(named(k) and fits(v) for k, v in value.items())

    return all_fit, f"an object of at most {most} entries, each {expected}"


def _either(*checks: Check) -> Check:
    return lambda value: any(fits(value) for fits, _ in checks), " or ".join(expected for _, expected in checks)


def _one_of(*values: str) -> Check:
    return lambda value: type(value) is str and value in values, f"one of {', '.join(map(repr, values))}"


def _harmless(value: object) -> bool:
    """Whether no text in a JSON value holds control characters, but for tabs and ends of lines."""
    if isinstance(value, dict):
        return all(_harmless(name) and _harmless(one) for name, one in value.items())
    if isinstance(value, list):
        return all(map(_harmless, value))
    return not isinstance(value, str) or not controls(value.replace("\n", " ").replace("\t", " "))


def _is_training(value: object) -> bool:
    if type(value) is not dict or not _harmless(value):
        return False
    settings = value.get("settings", {})
    parts = [settings, value.get("progress", {})]
    if type(settings) is dict:
        parts += [settings.get(name, {}) for name in ("model", "distill", "data", "optim")]
    return all(type(part) is dict for part in parts)


def _is_range(value: object) -> bool:
    fits, _ = _number(0.0, 1000.0)
    return type(value) is list and len(value) == 2 and all(map(fits, value)) and value[0] <= value[1]


SIZE = _whole(0, 1 << 24)

STEPS = _whole(1, 1000)

KINDS: dict[str, Check] = {
    "base": _text(1000),
    "family": _text(64),
    "modes": _whole(1, 256),
    "pixels": _whole(1, 256),
    "rank": _whole(0, 1 << 16),
    "alpha": _number(0.0, 1e6),
    "targets": _one_of(*get_args(Targets)),
    "form": _one_of(*get_args(Form)),
    "shift": _number(0.0, 1000.0, above=True),
    "steps": STEPS,
    "also_steps": _list(STEPS, 64),
    "final_step_scale": _number(0.0, 1000.0, above=True),
    "guidance": _or_null(_number(0.0, 1000.0)),
    "guidance_range": _or_null((_is_range, "two finite numbers from 0 to 1000, the lower one first")),
    "teacher_lora": _or_null(_text(1000)),
    "sizes": _object(
        _or_null(_either((lambda value: type(value) is bool, "true or false"), SIZE, _list(SIZE, 16))), 32
    ),
    "fingerprint": _list(_number(-1e9, 1e9), 256),
    "versions": _object(_text(100), 32),
    "training": (_is_training, "an object whose settings and progress are objects, without control characters"),
    "sha256": _object((lambda v: type(v) is str and len(v) == 64 and set(v) <= set("0123456789abcdef"), "64 hex"), 1),
}
"""What each field must be."""
