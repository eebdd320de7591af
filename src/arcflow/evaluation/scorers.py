"""Scorers that live in an environment of their own: a command, a list of images in, their scores out.

Preference models and detectors pin versions that clash with ours and with one another, so none is imported here. A
scorer is any command with {manifest} and {out} in it. The manifest has one line of JSON for each image that has no
score yet: {"id", "prompt", "image", "category", "suite", "seed"}, and "metadata" where the benchmark has some. For each
the command writes a line {"id", "score"} to {out}, best at once: what is there when it dies is kept. The answers end up
in `scores/<name>.jsonl`, whole or not at all, each with a checksum; what was damaged since is asked for again.

A command ends with us, however we end: it runs in a session of its own, and a shell beside it waits for the end of a
pipe that we alone hold open.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from arcflow.system import files, records
from arcflow.system.text import shown

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""What would make a scorer believe that it is one of our processes."""

CONTRACT = 'one line {"id": ..., "score": a finite number} for each line of the manifest'


@dataclass(frozen=True, kw_only=True)
class ManifestLine:
    """An image in a scorer's manifest."""

    id: str
    prompt: str
    image: str
    """File of the image."""
    category: str
    suite: str
    seed: int
    metadata: dict[str, object] | None = None
    """What the benchmark says of the prompt besides; None if nothing."""


def part_of(share: tuple[int, int]) -> str:
    """What the names of one process's files end in."""
    rank, ranks = share
    return "" if ranks == 1 else f"-{rank}-of-{ranks}"


def parse_scorer(named: str) -> tuple[str, str]:
    """Name and command of NAME="COMMAND"."""
    name, _, command = named.partition("=")
    if not re.fullmatch(r"\w+", name) or "{manifest}" not in command or "{out}" not in command:
        raise ValueError(
            f"cannot use the scorer {named!r}: expected NAME='COMMAND', a name of letters and digits, a command with "
            "{manifest} and {out} in it; for example hps='python score.py {manifest} {out}'"
        )
    return name, command


def read_scores(folder: Path, name: str) -> dict[str, float]:
    """All scores of a scorer so far, by id of the image."""
    found = [record for file in _stores(folder, name) for record in _stored(file)]
    return {str(record["id"]): float(str(record["score"])) for record in found}


def _stores(folder: Path, name: str) -> list[Path]:
    paths = (folder / "scores").glob(f"{name}*.jsonl")
    return sorted(path for path in paths if re.match(rf"{name}(-|\.)", path.name))


def _parsed(path: Path) -> list[tuple[str, object]]:
    """The lines of a file that are there, and what JSON makes of each; None of what is no JSON."""
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else []
    return [(line, _json(line)) for line in lines if line.strip()]


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _stored(path: Path) -> list[dict[str, object]]:
    """The records of a file of ours that are as they were written; those of before have no checksum."""
    found = [record for _, record in _parsed(path) if isinstance(record, dict)]
    return [one for one in found if not _flaw(one) and one.get("sum", _sum(one)) == _sum(one)]


def _sum(record: Mapping[str, object]) -> str:
    return f"{zlib.crc32(json.dumps([record.get('id'), record.get('score')]).encode()):08x}"


def _flaw(record: Mapping[str, object]) -> str:
    """Why a record is no score; empty if it is one."""
    name, score = record.get("id"), record.get("score")
    if not isinstance(name, str):
        return f"{shown(repr(name), 60)} is no id"
    if isinstance(score, bool) or not isinstance(score, int | float):
        return f"{shown(name, 60)} has no score"
    try:
        finite = math.isfinite(score)
    except OverflowError:  # a whole number beyond all floats
        finite = False
    return "" if finite else f"{shown(name, 60)} has the score {shown(score, 20)}"


def run_scorer(
    folder: Path, name: str, command: str, images: Sequence[ManifestLine], share: tuple[int, int] = (0, 1)
) -> int:
    """Let a command score those of the images, lines of a manifest, that have no score yet; how many it scored.

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
    for path in _stores(folder, name):
        if lost := len(_parsed(path)) - len(_stored(path)):
            print(f"{path}: {lost} lines are damaged; their images are scored again", file=sys.stderr)
            files.write_lines(path, _stored(path))
    before = read_scores(folder, name)
    missing = [image for image in images if image.id not in before]
    if not missing:
        return 0
    files.write_text(manifest, "".join(json.dumps(records.plain(line)) + "\n" for line in missing))
    for place, path in (("{manifest}", manifest), ("{out}", out)):
        command = command.replace(place, shlex.quote(str(path.absolute())))
    code = _run(command, log)
    _collect(store, name)
    there = read_scores(folder, name)
    silent = [image.id for image in missing if image.id not in there]
    if code or silent:
        said = [shown(line) for line in log.read_text("utf-8", errors="replace").strip().splitlines()[-3:]]
        what = f"ended with code {code}" if code else f"left out {silent[0]!r}"
        raise ValueError(
            f"the scorer {name} {what} after {len(missing) - len(silent)} of {len(missing)} images, whose scores are "
            f"kept ({' / '.join(said) or 'it said nothing'}; {log}): expected {CONTRACT}; correct it and run the same "
            "command again, it goes on from there"
        )
    manifest.unlink()
    return len(missing)


WATCHED = """exec 3<&0 </dev/null
{ cat <&3 >/dev/null; kill -TERM 0; } &
watch=$!
(
%s
) 3<&-
code=$?
kill $watch 2>/dev/null
exit $code
"""
"""What the shell runs: the command, and beside it a wait for the end of its standard input, which is ours."""


def _run(command: str, log: Path) -> int:
    """Exit code of a command that writes into a log, and of which nothing is left when this ends."""
    with log.open("w") as sink:
        if os.name == "nt":
            return subprocess.run(command, shell=True, env=_environment(), stdout=sink, stderr=sink).returncode
        process = subprocess.Popen(
            ["/bin/sh", "-c", WATCHED % command],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of a session: politely, then for sure."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin:
        with suppress(OSError):
            process.stdin.close()


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
    manifest = store.with_suffix(".manifest")
    out = store.with_suffix(".out")
    if not out.exists() or not manifest.exists():
        return
    if out.is_dir():
        raise ValueError(
            f"{out} is a folder: expected what the scorer {name} answers; remove it, and correct the scorer"
        )
    asked = {record.get("id") for _, record in _parsed(manifest) if isinstance(record, dict)}
    kept = {str(record["id"]): record for record in _stored(store)}
    lines = out.read_text("utf-8", errors="replace").split("\n")
    wrong = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record, flaw = _read(line, asked, kept)
        if not flaw:
            kept[str(record["id"])] = record | {"sum": _sum(record)}
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


def _read(
    line: str, asked: Collection[object], kept: Mapping[str, Mapping[str, object]]
) -> tuple[dict[str, object], str]:
    """An answer, and what is wrong with it; empty if nothing is."""
    record = _json(line)
    if record is None:
        return {}, "no JSON"
    if not isinstance(record, dict) or not isinstance(record.get("id"), str) or record["id"] not in asked:
        return {}, f"unknown id {shown(repr(record.get('id') if isinstance(record, dict) else record), 60)}"
    if flaw := _flaw(record):
        return {}, flaw
    before = kept.get(record["id"], record)["score"]
    if before != record["score"]:
        return {}, f"{record['id']} has two scores, {before} and {record['score']}"
    return record, ""
