"""Embeddings of prompts on disk, so that a training needs no text encoder.

A cache is a folder: `cache.json` says what it is of, `shard-00000.safetensors` and so on hold some prompts each (the
file's metadata have their texts, and what they are bound to), and beside each lies its checksum. A shard appears whole
or not at all, so making a cache can be killed at any time, and several processes can share the work; what is there and
unbroken is not made again. A training holds every shard against its checksum before it reads from it, and notes in
`checked.json` which files it has held, so that it does so once.

Text that is masked as padding is not stored. FLUX.1 has no mask: its transformer attends to the padding of all 512
tokens, so that is stored too; `max_sequence_length` shortens it, for teacher and student alike. float8 keeps a scale
for every token.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from arcflow.families.conditioning import Cond
from arcflow.system import files
from arcflow.system.owner import owned_share
from arcflow.system.text import Json

Stored = Literal["float32", "bfloat16", "float16", "float8"]

MASK = "encoder_hidden_states_mask"

SPARE = 1.05
"""Room on the disk, relative to what is needed."""

ABOUT = "cache.json"
"""What a cache is of; `sum` is the digest of all else in it."""

CHECKED = "checked.json"
"""Which shards were held against their checksums, as they were then: size, times and checksum."""

HEADER = 100_000_000
"""Bytes that safetensors takes for the names and texts of a file, at most."""

ENTRY = 128
"""Bytes of a tensor's entry there, at most: its name, kind, shape and place."""

HEAL = "run the same `arcflow cache make` again: it makes these shards, and only these"


def make(
    folder: Path,
    encode: Callable[[list[str]], Cond],
    prompts: Sequence[str],
    *,
    about: Json,
    dtype: Stored = "bfloat16",
    shard: int = 1024,
    batch: int = 16,
    share: tuple[int, int] = (0, 1),
    log: Callable[[str], None] = print,
) -> None:
    """Encode every prompt once, and the empty one.

    Args:
        encode: prompts to their conditioning without image and guidance, see `network.encode_text`.
        about: what the embeddings depend on (model, text length, and `encoder`, a digest of the text encoders' weights,
            where it is known); a folder with other settings is refused.
        shard: prompts in a file.
        share: number of this process and of all of them; process i of n makes shards i, i + n, i + 2 n, ...

    Raises:
        ValueError: the folder holds another cache, another process makes it, the disk is too small, a file would take
            too many prompts, or an embedding is not finite. If nothing was made, nothing is left behind.
    """
    prompts = list(dict.fromkeys(["", *prompts]))
    for name, value in (("shard", shard), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} = {value}: expected 1 or more; leave it out to take the default")
    parts = [prompts[first : first + shard] for first in range(0, len(prompts), shard)]
    sizes = [len(json.dumps(json.dumps(texts))) for texts in parts]
    _fits(folder, max(sizes), shard, 1)
    with (
        owned_share(folder, share, "makes embeddings"),
        _claimed(folder, about, dtype, shard, prompts, log) as known,
    ):
        if share[1] == 1:
            files.sweep(folder)
        names = _shards(len(prompts), shard)
        bond = _bond(known)
        own = list(range(share[0], len(names), share[1]))
        flaws = dict(zip(own, _each(lambda i: _flaw(folder, names[i], bond, i, parts[i]), own), strict=True))
        for i, flaw in flaws.items():
            path = folder / f"{names[i]}.safetensors"
            if path.is_dir():
                raise ValueError(f"{path} is a folder: expected a file, or none; take it away")
            if flaw and path.exists():
                log(f"{path}: {flaw}; made again")
        missing = [i for i, flaw in flaws.items() if flaw]
        estimated = False
        with tqdm(total=sum(len(parts[i]) for i in missing), desc="cache", unit="prompt") as bar:
            for i in missing:
                texts = parts[i]
                tensors = dict[str, Tensor]()
                started = time.monotonic()
                for first in range(0, len(texts), batch):
                    part = texts[first : first + batch]
                    for k, row in enumerate(_split(encode(part), len(part))):
                        packed = _pack(row, dtype, part[k])
                        tensors |= {f"{first + k}.{name}": value for name, value in packed.items()}
                    bar.update(len(part))
                    if not estimated:
                        size = sum(t.nbytes for t in tensors.values()) / len(part)
                        _fits(folder, max(sizes), min(shard, len(prompts)), -(-len(tensors) // len(part)))
                        seconds = (time.monotonic() - started) / len(part)
                        _estimate(folder, size, int(bar.total), seconds, share[1], log)
                        estimated = True
                path = folder / f"{names[i]}.safetensors"
                metadata = {"prompts": json.dumps(texts), "of": bond.key, "number": str(i)}
                files.write_atomic(path, partial(_write, tensors=tensors, metadata=metadata))
                files.write_text(path.with_suffix(".sha256"), files.digest(path) + "\n")


def contents(folder: Path) -> str:
    """Tells caches apart by what their numbers depend on, whatever path they lie at and whatever prompts they hold.

    Raises:
        ValueError: there is no cache, or its record is damaged.
    """
    about, flaw = _about(folder)
    if about is None:
        raise ValueError(f"{folder / ABOUT}: {flaw}; {HEAL}")
    free = {"sum", "shard", "prompts", "digest", "model" if about.get("encoder") is not None else "encoder"}
    return files.text_digest(sorted((name, value) for name, value in about.items() if name not in free), 16)


def verify(folder: Path) -> list[str]:
    """What is wrong with a cache: a line for each shard that is missing, broken or of something else, and for
    `cache.json`.

    Raises:
        ValueError: there is no cache.
    """
    about, flaw = _about(folder)
    if about is None:
        return [f"{folder / ABOUT}: {flaw}"]
    names = _shards(about["prompts"], about["shard"])
    bond = _bond(about)
    flaws = _each(lambda i: _flaw(folder, names[i], bond, i), range(len(names)))
    found = [f"{folder / name}.safetensors: {flaw}" for name, flaw in zip(names, flaws, strict=True) if flaw]
    if not found and _texts_digest(folder, names) != about["digest"]:
        found = [f"{folder}: its shards hold other prompts than {ABOUT} says"]
    return found


class Cache:
    """Embeddings that were made before. Called with prompts it gives their conditioning without image and guidance.

    Raises:
        ValueError: no cache in the folder, one of something else, or one that is damaged.
    """

    def __init__(self, folder: Path, about: Json, device: torch.device, dtype: torch.dtype) -> None:
        self.folder = folder
        self.device = device
        self.dtype = dtype
        there, flaw = _about(folder)
        if there is None:
            raise ValueError(f"{folder / ABOUT}: {flaw}; {HEAL}")
        if other := files.differing(there, about, _unknown(there, about)):
            raise ValueError(
                f"{folder} holds embeddings of something else ({other}): expected the same settings; "
                f"make another cache with `arcflow cache make`, or correct data.embeddings"
            )
        names = _shards(there["prompts"], there["shard"])
        _check(folder, names, _bond(there))
        self.files: list[tuple[Any, list[list[str]]]] = []
        self.row: dict[str, tuple[int, int]] = {}
        for name in names:
            file, texts = _opened(folder / f"{name}.safetensors")
            self.row |= {text: (len(self.files), i) for i, text in enumerate(texts)}
            tensors: list[list[str]] = [[] for _ in texts]
            for tensor in file.keys():  # noqa: SIM118
                tensors[int(tensor.partition(".")[0])].append(tensor)
            self.files.append((file, tensors))
        if files.text_digest(list(self.row)) != there["digest"]:
            raise ValueError(f"{folder}: its shards hold other prompts than {ABOUT} says; {HEAL}")

    def widths(self) -> dict[str, int]:
        """How wide the embeddings are, by name."""
        stored = self._read(0, 0)
        return {name: value.shape[-1] for name, value in stored.items() if value.is_floating_point()}

    def need(self, prompts: Sequence[str]) -> None:
        """
        Raises:
            ValueError: some of the prompts are not here.
        """
        missing = [text for text in prompts if text not in self.row]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {len(prompts)} prompts, the first {missing[0][:60]!r}: "
                f"expected all of them; run `arcflow cache make` with the same prompts, to its end"
            )

    def __call__(self, prompts: list[str]) -> Cond:
        rows = [self._read(*self.row[prompt]) for prompt in prompts]
        if MASK in rows[0]:
            longest = max(len(row[MASK]) for row in rows)
            rows = [row | {name: _padded(row[name], longest) for name in _TEXT} for row in rows]
        cond = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        for name, value in cond.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(
                    f"{self.folder}: {name} of {prompts[0][:60]!r}, or of another prompt of its batch, is not finite: "
                    f"expected numbers that {self.dtype} holds; make the cache again with --stored bfloat16 or float32"
                )
        return {name: value.to(self.device) for name, value in cond.items()}

    def _read(self, shard: int, row: int) -> Cond:
        file, names = self.files[shard]
        stored = {name.partition(".")[2]: file.get_tensor(name) for name in names[row]}
        return _unpack(stored, self.dtype)


_TEXT = ("encoder_hidden_states", MASK)


def _padded(value: Tensor, length: int) -> Tensor:
    return torch.cat([value, value.new_zeros(length - len(value), *value.shape[1:])])


def _split(cond: Cond, count: int) -> Iterator[Cond]:
    """The rows of a batch, without what is masked."""
    for i in range(count):
        row = {name: value[i].cpu() for name, value in cond.items()}
        if MASK in row:
            kept = row[MASK]
            row |= {name: row[name][kept] for name in _TEXT}
        yield row


def _pack(row: Cond, dtype: Stored, prompt: str) -> Cond:
    """A prompt's embeddings as they are stored. Raises ValueError if a number is not finite, or would not be."""
    packed: Cond = {}
    for name, value in row.items():
        if not value.is_floating_point():
            packed[name] = value.contiguous()
            continue
        if not value.isfinite().all():
            raise ValueError(
                f"the text encoder gives {name} of {prompt[:60]!r} that is not finite: expected numbers; take another "
                f"--dtype (float32 or bfloat16), or look at the model"
            )
        if dtype == "float8":
            scale = value.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
            packed[name] = (value.float() / scale).to(torch.float8_e4m3fn).contiguous()
            packed[f"{name}.scale"] = scale.contiguous()
        else:
            packed[name] = value.to(getattr(torch, dtype)).contiguous()
            if not packed[name].isfinite().all():
                raise ValueError(
                    f"{name} of {prompt[:60]!r} reaches {float(value.abs().max()):.3g}, which {dtype} does not hold: "
                    f"take another --stored (bfloat16 or float32)"
                )
    return packed


def _unpack(packed: Cond, dtype: torch.dtype) -> Cond:
    row = {name: value for name, value in packed.items() if not name.endswith(".scale")}
    for name, value in row.items():
        if f"{name}.scale" in packed:
            row[name] = (value.float() * packed[f"{name}.scale"]).to(dtype)
        elif value.is_floating_point():
            row[name] = value.to(dtype)
    return row


def _estimate(folder: Path, size: float, count: int, seconds: float, ranks: int, log: Callable[[str], None]) -> None:
    """Say what is to come, and refuse what the disk cannot hold."""
    needed = size * count
    free = shutil.disk_usage(folder).free
    log(f"{count} prompts for this process: about {needed / 1e9:.2f} GB and {seconds * count / 60:.0f} min")
    if SPARE * needed * ranks > free:
        raise ValueError(
            f"{folder}: {needed * ranks / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free: expected room for all "
            f"embeddings; take another disk, --stored float8, a smaller --max-sequence-length, or train without a cache"
        )


def _fits(folder: Path, texts: int, rows: int, tensors: int) -> None:
    """Refuse files with more names and texts than safetensors writes, which would say so only at the end."""
    needed = texts + ENTRY * rows * tensors + ENTRY
    if needed > HEADER:
        raise ValueError(
            f"{folder}: {rows} prompts in a file take {needed / 1e6:.0f} MB of names and texts, and {HEADER / 1e6:.0f} "
            f"are possible: expected fewer; take a smaller --shard (the usual one is 1024)"
        )


@contextmanager
def _claimed(
    folder: Path, about: Json, dtype: Stored, shard: int, prompts: list[str], log: Callable[[str], None]
) -> Iterator[Json]:
    """What the cache in the folder is of; if there is none, it becomes one of these prompts and settings.

    A damaged `cache.json` is written again. If there was none and the block fails before a shard is made, it goes
    again, so that corrected settings are not refused.
    """
    settings = {**about, "dtype": dtype, "shard": shard, "prompts": len(prompts), "digest": files.text_digest(prompts)}
    path = folder / ABOUT
    existed = path.exists()
    there, flaw = _about(folder) if existed else (None, "")
    if there is not None:
        if other := files.differing(there, settings, _unknown(there, settings)):
            raise ValueError(
                f"{folder} holds embeddings with other settings ({other}): expected the same ones to go on with it; "
                f"repeat them, or choose another folder with --out"
            )
        yield there
        return
    if existed:
        log(f"{path}: {flaw}; written again")
    # Shards that do not say what they are bound to may be another model's: only a cache.json could tell.
    for stray in folder.glob("shard-*.sha256"):
        if "of" not in _metadata(stray.with_suffix(".safetensors")):
            stray.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    settings["sum"] = files.text_digest(settings)
    files.write_text(path, json.dumps(settings, indent=2) + "\n")
    try:
        yield settings
    except BaseException:
        if not existed and not any(folder.glob("shard-*.safetensors")):
            path.unlink(missing_ok=True)
        raise


def _unknown(there: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """Settings that are not compared: encoders that one side does not know, and the model's name where both do, for
    then it may lie elsewhere."""
    known = there.get("encoder") is not None and wanted.get("encoder") is not None
    return ["model"] if known else ["encoder"]


def _about(folder: Path) -> tuple[Json | None, str]:
    """What a cache is of; or None, and what is wrong with `cache.json`.

    Raises:
        ValueError: there is none.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(f"no cache in {folder}: expected a folder made by `arcflow cache make`; check the path")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None, "it is no JSON"
    if not isinstance(found, dict):
        return None, "it is no record of a cache"
    rest = {name: value for name, value in found.items() if name != "sum"}
    if "sum" in found and found["sum"] != files.text_digest(rest):  # caches of before have none
        return None, "it was changed, or damaged"
    sizes = (found.get("prompts"), found.get("shard"))
    if not all(type(size) is int and 1 <= size < 1 << 40 for size in sizes) or not isinstance(found.get("digest"), str):
        return None, "it does not say how many prompts there are, or which"
    return found, ""


class Bond(NamedTuple):
    """What the shards of a cache are bound to."""

    key: str
    """Digest of everything that the embeddings depend on."""
    said: bool
    """Whether they say so; those of before do not."""


def _bond(about: Mapping[str, Any]) -> Bond:
    """Digest of what a cache says that it holds. A model's path does not count where its encoder is known."""
    free = {"sum", "model" if about.get("encoder") is not None else "encoder"}
    kept = sorted((name, value) for name, value in about.items() if name not in free)
    return Bond(files.text_digest(kept), "sum" in about)


def _shards(prompts: int, size: int) -> list[str]:
    return [f"shard-{i:05d}" for i in range(-(-prompts // size))]


def _flaw(folder: Path, name: str, bond: Bond, number: int, texts: Sequence[str] | None = None) -> str:
    """What is wrong with a shard; empty if nothing is."""
    path, sums = folder / f"{name}.safetensors", folder / f"{name}.sha256"
    if not path.is_file():
        return "missing"
    if not sums.is_file():
        return "without its checksum"
    if files.digest(path) != sums.read_text("utf-8", errors="replace").strip():
        return "its checksum is wrong"
    return _foreign(path, bond, number, texts)


def _foreign(path: Path, bond: Bond, number: int, texts: Sequence[str] | None = None) -> str:
    """What a shard is instead of the one with this number of this cache; empty if it is that one, as far as it says: in
    caches of before shards are not bound to anything."""
    about = _metadata(path)
    own = (bond.key, str(number))
    if (about.get("of", own[0]), about.get("number", own[1])) != own or (bond.said and "of" not in about):
        return "it is a shard of something else"
    try:
        found = json.loads(about.get("prompts", "null"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or (texts is not None and found != list(texts)):
        return "it holds other prompts"
    return ""


def _metadata(path: Path) -> dict[str, str]:
    """Checksum of a shard; empty if the file cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a shard that has the same bytes whenever it is made: safetensors has its metadata in any order."""
    save_file(tensors, path, metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(ordered) <= length
        file.seek(8)
        file.write(ordered.ljust(length))


def _opened(path: Path) -> tuple[Any, list[str]]:
    """A shard, and its prompts."""
    try:
        file = safe_open(path, "pt")
        return file, json.loads(file.metadata()["prompts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not whole ({error}); {HEAL}") from error


def _texts_digest(folder: Path, names: Sequence[str]) -> str:
    texts = [text for name in names for text in _opened(folder / f"{name}.safetensors")[1]]
    return files.text_digest(texts)


def _check(folder: Path, names: Sequence[str], bond: Bond) -> None:
    """Hold every shard against its checksum, unless that was done and the file is as it was.

    Raises:
        ValueError: one is missing, broken, or of something else.
    """
    known = _read_checked(folder)
    states = [_state(folder, name) for name in names]
    new = [i for i, name in enumerate(names) if states[i] is None or known.get(name) != states[i]]
    flaws = dict(zip(new, _each(lambda i: _flaw(folder, names[i], bond, i), new), strict=True))
    for i in set(range(len(names))) - set(new):
        flaws[i] = _foreign(folder / f"{names[i]}.safetensors", bond, i)
    wrong = [f"{folder / names[i]}.safetensors: {flaws[i]}" for i in sorted(flaws) if flaws[i]]
    if wrong:
        more = f", and {len(wrong) - 1} more of {len(names)} shards" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}: expected embeddings as they were made; {HEAL}")
    if new:
        with suppress(OSError):  # a folder that others own, or that is read-only: held again next time
            files.write_text(folder / CHECKED, json.dumps(dict(zip(names, states, strict=True))) + "\n")


def _read_checked(folder: Path) -> Json:
    try:
        found = json.loads((folder / CHECKED).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(folder: Path, name: str) -> list[Any] | None:
    """How a shard and its checksum stand there now; whoever writes to a file changes its times."""
    path = folder / f"{name}.safetensors"
    try:
        stat = os.stat(path)
        total = path.with_suffix(".sha256").read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, total]


def _each(call: Callable[[int], str], numbers: Iterable[int]) -> list[str]:
    """A function of many files, which are read side by side."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(call, numbers))
