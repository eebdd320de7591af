"""Embeddings of prompts on disk, so that a training needs no text encoder.

A cache is a folder: `cache.json` says what it is of, `shard-00000.safetensors` and so on hold some prompts each (their
texts stand in the file's metadata), and beside each lies its checksum. A shard appears whole or not at all, so making a
cache can be killed at any time, and several processes can share the work; what is there and unbroken is not made again.

Text that is masked as padding is not stored. FLUX.1 has no mask: its transformer attends to the padding of all 512
tokens, so that is stored too; `max_sequence_length` shortens it, for teacher and student alike. float8 keeps a scale
for every token.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from arcflow.families.conditioning import Cond
from arcflow.system import files

Stored = Literal["float32", "bfloat16", "float16", "float8"]

MASK = "encoder_hidden_states_mask"

SPARE = 1.05
"""Room on the disk, relative to what is needed."""


def make(
    folder: Path,
    encode: Callable[[list[str]], Cond],
    prompts: Sequence[str],
    *,
    about: dict[str, Any],
    dtype: Stored = "bfloat16",
    shard: int = 1024,
    batch: int = 16,
    share: tuple[int, int] = (0, 1),
    log: Callable[[str], None] = print,
) -> None:
    """Encode every prompt once, and the empty one.

    Args:
        encode: prompts to their conditioning without picture and guidance, see `backbone.encode_text`.
        about: what the embeddings depend on (model, text length); a folder with other settings is refused.
        shard: prompts in a file.
        share: number of this process and of all of them; each makes every so manieth shard.

    Raises:
        ValueError: the folder holds another cache, or the disk is too small.
    """
    prompts = list(dict.fromkeys(["", *prompts]))
    settings = {**about, "dtype": dtype, "shard": shard, "prompts": len(prompts), "digest": files.text_digest(prompts)}
    files.claim(folder / "cache.json", json.dumps(settings, indent=2) + "\n", holds="embeddings")
    names = _shards(len(prompts), shard)
    own = [i for i in range(share[0], len(names), share[1])]
    flaws = {i: _flaw(folder, names[i]) for i in own}
    for i, flaw in flaws.items():
        if flaw and (folder / f"{names[i]}.safetensors").exists():
            log(f"{folder / names[i]}.safetensors: {flaw}; made again")
    missing = [i for i, flaw in flaws.items() if flaw]
    estimated = False
    bar = tqdm(total=sum(len(prompts[i * shard : (i + 1) * shard]) for i in missing), desc="cache", unit="prompt")
    with bar:
        for i in missing:
            texts, tensors, started = prompts[i * shard : (i + 1) * shard], dict[str, Tensor](), time.monotonic()
            for first in range(0, len(texts), batch):
                part = texts[first : first + batch]
                for k, row in enumerate(_split(encode(part), len(part))):
                    tensors |= {f"{first + k}.{name}": value for name, value in _pack(row, dtype).items()}
                bar.update(len(part))
                if not estimated:
                    size = sum(t.nbytes for t in tensors.values()) / len(part)
                    _estimate(folder, size, int(bar.total), (time.monotonic() - started) / len(part), share[1], log)
                    estimated = True
            path = folder / f"{names[i]}.safetensors"
            metadata = {"prompts": json.dumps(texts)}
            files.write_tensors(path, tensors, metadata)
            files.write_text(path.with_suffix(".sha256"), files.digest(path) + "\n")


def verify(folder: Path) -> list[str]:
    """What is wrong with a cache: a line for each shard that is missing or broken.

    Raises:
        ValueError: there is no cache.
    """
    about = _about(folder)
    flaws = ((name, _flaw(folder, name)) for name in _shards(about["prompts"], about["shard"]))
    return [f"{folder / name}.safetensors: {flaw}" for name, flaw in flaws if flaw]


class Cache:
    """Embeddings that were made before. Called with prompts it gives their conditioning without picture and guidance.

    Raises:
        ValueError: no cache in the folder, or one of something else.
    """

    def __init__(self, folder: Path, about: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        if other := files.differing(_about(folder), about):
            raise ValueError(
                f"{folder} holds embeddings of something else ({other}): expected the same settings; "
                f"make another cache with `arcflow cache make`, or correct data.embeddings"
            )
        self.files: list[tuple[Any, list[list[str]]]] = []
        self.row: dict[str, tuple[int, int]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            try:
                file = safe_open(path, "pt")
                texts = json.loads(file.metadata()["prompts"])
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not whole ({error}): run the same `arcflow cache make` again") from error
            self.row |= {text: (len(self.files), i) for i, text in enumerate(texts)}
            names: list[list[str]] = [[] for _ in texts]
            for name in file.keys():  # noqa: SIM118
                names[int(name.partition(".")[0])].append(name)
            self.files.append((file, names))

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
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

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


def _pack(row: Cond, dtype: Stored) -> Cond:
    packed: Cond = {}
    for name, value in row.items():
        if not value.is_floating_point():
            packed[name] = value.contiguous()
        elif dtype == "float8":
            scale = value.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
            packed[name] = (value.float() / scale).to(torch.float8_e4m3fn).contiguous()
            packed[f"{name}.scale"] = scale.contiguous()
        else:
            packed[name] = value.to(getattr(torch, dtype)).contiguous()
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
    needed, free = size * count, shutil.disk_usage(folder).free
    log(f"{count} prompts for this process: about {needed / 1e9:.2f} GB and {seconds * count / 60:.0f} min")
    if SPARE * needed * ranks > free:
        raise ValueError(
            f"{folder}: {needed * ranks / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free: expected room for all "
            f"embeddings; take another disk, --stored float8, a smaller --max-sequence-length, or train without a cache"
        )


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "cache.json"
    if not path.is_file():
        raise ValueError(f"no cache in {folder}: expected a folder made by `arcflow cache make`; check the path")
    return json.loads(path.read_text("utf-8"))


def _shards(prompts: int, size: int) -> list[str]:
    return [f"shard-{i:05d}" for i in range(-(-prompts // size))]


def _flaw(folder: Path, name: str) -> str:
    """What is wrong with a shard; empty if nothing is."""
    path, sums = folder / f"{name}.safetensors", folder / f"{name}.sha256"
    if not path.is_file():
        return "missing"
    if not sums.is_file():
        return "without its checksum"
    return "" if files.digest(path) == sums.read_text().strip() else "its checksum is wrong"
