"""Scorers that live in an environment of their own: a command, a list of pictures in, their scores out.

Preference models and detectors pin versions that clash with ours and with one another, so none is imported here. A
scorer is any command with {manifest} and {out} in it. The manifest has one line of JSON for each picture that has no
score yet: {"id", "prompt", "image", "category", "suite", "seed"}, and "metadata" where the benchmark has some. For each
the command writes a line {"id", "score"} to {out}, best at once: what is there when it dies is kept. The answers end up
in `scores/<name>.jsonl`, whole or not at all.
"""

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arcflow.system import files, records

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""What would make a scorer believe that it is one of our processes."""

CONTRACT = 'one line {"id": ..., "score": a finite number} for each line of the manifest'


@dataclass(frozen=True, kw_only=True)
class Line:
    """A picture in a scorer's manifest."""

    id: str
    prompt: str
    image: str
    """Its file."""
    category: str
    suite: str
    seed: int
    metadata: dict[str, object] | None = None
    """What the benchmark says of the prompt besides; None if nothing."""


def part_of(share: tuple[int, int]) -> str:
    """What the names of one process's files end in."""
    rank, ranks = share
    return "" if ranks == 1 else f"-{rank}-of-{ranks}"


def parse(named: str) -> tuple[str, str]:
    """Name and command of NAME="COMMAND"."""
    name, _, command = named.partition("=")
    if not re.fullmatch(r"\w+", name) or "{manifest}" not in command or "{out}" not in command:
        raise ValueError(
            f"cannot use the scorer {named!r}: expected NAME='COMMAND', a name of letters and digits, a command with "
            "{manifest} and {out} in it; for example hps='python score.py {manifest} {out}'"
        )
    return name, command


def read_scores(folder: Path, name: str) -> dict[str, float]:
    """All scores of a scorer so far, by id of the picture."""
    stores = [path for path in (folder / "scores").glob(f"{name}*.jsonl") if re.match(rf"{name}(-|\.)", path.name)]
    records = [record for file in sorted(stores) for record in files.read_lines(file)]
    return {record["id"]: float(record["score"]) for record in records}


def ask(folder: Path, name: str, command: str, pictures: Sequence[Line], share: tuple[int, int] = (0, 1)) -> int:
    """Let a command score those of the pictures, lines of a manifest, that have no score yet; how many it scored.

    Raises:
        ValueError: it failed, or did not answer as agreed; what it did answer is kept.
    """
    store = folder / "scores" / f"{name}{part_of(share)}.jsonl"
    manifest, out, log = (store.with_suffix(f".{kind}") for kind in ("manifest", "out", "log"))
    store.parent.mkdir(parents=True, exist_ok=True)
    _collect(store, name)  # what a run that was killed has left
    if share == (0, 1):
        for part in store.parent.glob(f"{name}-*-of-*.manifest"):
            _collect(part.with_suffix(".jsonl"), name)
    before = read_scores(folder, name)
    missing = [picture for picture in pictures if picture.id not in before]
    if not missing:
        return 0
    files.write_text(manifest, "".join(json.dumps(records.plain(line)) + "\n" for line in missing))
    for place, path in (("{manifest}", manifest), ("{out}", out)):
        command = command.replace(place, shlex.quote(str(path.absolute())))
    with log.open("w") as sink:
        code = subprocess.run(command, shell=True, env=_environment(), stdout=sink, stderr=sink).returncode
    _collect(store, name)
    there = read_scores(folder, name)
    silent = [picture.id for picture in missing if picture.id not in there]
    if code or silent:
        said = log.read_text("utf-8", errors="replace").strip().splitlines()[-3:]
        what = f"ended with code {code}" if code else f"left out {silent[0]!r}"
        raise ValueError(
            f"the scorer {name} {what} after {len(missing) - len(silent)} of {len(missing)} pictures, whose scores are "
            f"kept ({' / '.join(said) or 'it said nothing'}; {log}): expected {CONTRACT}; correct it and run the same "
            "command again, it goes on from there"
        )
    manifest.unlink()
    return len(missing)


def _environment() -> dict[str, str]:
    """Ours, without torchrun's, and of several GPUs only the one of this process."""
    mine = {name: value for name, value in os.environ.items() if name not in TORCHRUN and "TORCHELASTIC" not in name}
    if "LOCAL_RANK" in os.environ:
        local = int(os.environ["LOCAL_RANK"])
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        mine["CUDA_VISIBLE_DEVICES"] = cards[local] if local < len(cards) and cards[local] else str(local)
    return mine


def _collect(store: Path, name: str) -> None:
    """Move good answers to the scores; strange ones stay aside, and are an error."""
    manifest, out = store.with_suffix(".manifest"), store.with_suffix(".out")
    if not out.exists() or not manifest.exists():
        return
    asked = {record["id"] for record in files.read_lines(manifest)}
    kept = {record["id"]: record for record in files.read_lines(store)}
    lines = out.read_text("utf-8", errors="replace").split("\n")
    wrong = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record, flaw = _read(line, asked, kept)
        if not flaw:
            kept[record["id"]] = record
        elif place < len(lines) or flaw != "no JSON":  # else a last line cut short
            wrong.append(f"line {place}: {flaw}")
    files.write_lines(store, kept.values())
    if wrong:
        aside = out.replace(out.with_suffix(".strange"))
        raise ValueError(
            f"{len(wrong)} answers of the scorer {name} cannot be used ({aside}, {wrong[0]}): expected {CONTRACT}; the "
            "others are kept; correct the scorer and run the same command again"
        )
    out.unlink()


def _read(line: str, asked: set[str], kept: Mapping[str, Mapping[str, object]]) -> tuple[dict[str, object], str]:
    """An answer, and what is wrong with it; empty if nothing is."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}, "no JSON"
    if not isinstance(record, dict) or record.get("id") not in asked:
        return {}, f"unknown id {(record.get('id') if isinstance(record, dict) else record)!r}"
    score = record.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float):
        return {}, f"{record['id']} has no score"
    if not math.isfinite(score):
        return {}, f"{record['id']} has the score {score}"
    if kept.get(record["id"], record)["score"] != score:
        return {}, f"{record['id']} has two scores, {kept[record['id']]['score']} and {score}"
    return record, ""
