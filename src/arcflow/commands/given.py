"""What a command line means beside its words: a file of settings, a taste of it, a schedule as long as its run.

All of it is words that go in front of the user's own, so that what is explicit wins: of an option that is given twice
the last one counts.
"""

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from arcflow import config, recipes

QUICK = {
    "compare": "--out out/compare_quick --calls 2 --trainings 2 --budget 12000 --captions 1024 --count 96 --alike 8",
}
"""By command: what `--quick` sets, where nothing else is said."""


def completed(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(The words with what `--config FILE`, `--quick` and a shorter run put in front, what to say about it.)

    Raises:
        ValueError: the file cannot be read, or holds no settings.
    """
    words = list(words)
    read = dict[str, object]()
    said = list[str]()
    while "--config" in (names := [word.partition("=")[0] for word in words]):
        place = names.index("--config")
        _, equals, name = words[place].partition("=")
        if not equals and place + 1 == len(words):
            raise ValueError("--config: expected a file of YAML or JSON behind it")
        file = Path(name if equals else words[place + 1])
        del words[place : place + (1 if equals else 2)]
        read |= _read(file)
    command = words[0] if words else ""
    if command == "train":
        return _training(words, read)
    depth = 1 + (command in ("cache", "world") and len(words) > 1)
    quick = shlex.split(QUICK[command]) if command in QUICK and "--quick" in words else []
    own = _not_said(read, words[depth:])
    return [*words[:depth], *quick, *recipes.options(own), *words[depth:]], said


def _read(file: Path) -> dict[str, object]:
    """The settings in a file of YAML or JSON, by their full names; what a run folder adds to its own is left out."""
    import yaml

    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file}: expected a file of YAML or JSON that can be read ({error})") from None
    try:
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"--config {file} is neither YAML nor JSON ({line}); mend it there") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"--config {file}: expected settings and their values, one a line, say `seed: 3`")
    values.pop(config.CONTENTS, None)
    return {name.replace("-", "_"): value for name, value in config.flat(values).items()}


def _option(word: str) -> str:
    """The setting that an option sets; empty if the word is none."""
    name = word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else ""
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}{last.removeprefix('no_')}" if name not in recipes.ALONE else name


def _not_said(settings: Mapping[str, object], words: Sequence[str]) -> dict[str, object]:
    """The settings that the words do not give themselves."""
    given = {_option(word) for word in words}
    return {name: value for name, value in settings.items() if name not in given}


def _training(words: list[str], read: dict[str, object]) -> tuple[list[str], list[str]]:
    """The words of `train`: the recipe first, then what a file has, then a schedule, then what was given."""
    words = words[1:]
    before = list[str]()
    for place, word in reversed(list(enumerate(words))):
        if word.partition("=")[0] == "--processes":  # it is the command's own, wherever it was written
            end = place + (1 if "=" in word else 2)
            before = words[place:end]
            words = words[:place] + words[end:]
    recipe = words[0] if words and not words[0].startswith("-") else None
    rest = words[1:] if recipe else words
    processes, named = read.pop("processes", None), read.pop("recipe", None)
    if processes is not None and not before:
        before = ["--processes", str(processes)]
    if recipe is None and read:
        recipe = str(named) if named else recipes.nearest(read) if "model.base" in read else None
        if recipe is None:
            raise ValueError("--config: expected a line `recipe: flux` in it, or the recipe's name behind `train`")
    if recipe not in recipes.RECIPES:  # tyro says what is wrong with it, or shows its help
        return ["train", *before, *([recipe] if recipe else []), *rest], []
    own = _not_said(read, rest)
    base = {**config.flat(json.loads(config.to_json(recipes.RECIPES[recipe]()))), **own}
    scaled, said = _schedule(base, rest)
    return ["train", *before, recipe, *recipes.options({**own, **scaled}), *rest], said


def _schedule(base: Mapping[str, object], words: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """(Lengths that were not given, shortened as the run is; what to say about them.)

    A run that is in the folder already keeps its own lengths: it may be given more iterations, and goes on.
    """
    wanted = _number(words, "optim.iterations")
    whole = base["optim.iterations"]
    if wanted is None or not isinstance(whole, int) or not 0 < wanted < whole:
        return {}, []
    given = {_option(word) for word in words}
    there = dict[str, object]()
    with contextlib.suppress(OSError, ValueError, RecursionError):
        there = config.flat(json.loads((Path(_text(words, "out") or str(base["out"])) / "run.json").read_text("utf-8")))
    scaled = dict[str, object]()
    for name in recipes.SCHEDULE:
        length = base[name]
        if name in given or not isinstance(length, int) or length in (0, config.ALWAYS):
            continue
        scaled[name] = there[name] if isinstance(there.get(name), int) else max(1, length * wanted // whole)
    warmup = scaled.get("optim.warmup", base["optim.warmup"])
    fall = scaled.get("optim.cooldown_iterations")
    if "optim.warmup" in scaled and isinstance(warmup, int):
        scaled["optim.warmup"] = warmup = min(warmup, wanted - 1)  # one iteration is left to cool down
    if isinstance(fall, int) and isinstance(warmup, int):
        scaled["optim.cooldown_iterations"] = max(1, min(fall, wanted - warmup))
    if not scaled:
        return {}, []
    told = ", ".join(f"{name.replace('_', '-')} {base[name]} -> {length}" for name, length in scaled.items())
    count = f"{wanted} iteration{'s' if wanted > 1 else ''}"
    return scaled, [f"{count} instead of {whole}: the schedule is shortened with them ({told})"]


def _text(words: Sequence[str], name: str) -> str | None:
    """The value that an option is given, the last one counts."""
    found = None
    for place, word in enumerate(words):
        if _option(word) == name:
            _, equals, value = word.partition("=")
            found = value if equals else words[place + 1] if place + 1 < len(words) else None
    return found


def _number(words: Sequence[str], name: str) -> int | None:
    text = _text(words, name)
    return int(text) if text and text.isdecimal() else None
