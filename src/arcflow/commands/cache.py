"""`arcflow cache`: embeddings of prompts on disk."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, subcommand

from arcflow import config
from arcflow.sampling.open import SHIPPED, open_pipe


@dataclass(frozen=True, kw_only=True)
class CacheMake:
    """Encode prompts once, for `data.embeddings` of a training. May be killed, repeated, and run by several processes
    (`torchrun`); broken shards are made again."""

    model: str = SHIPPED
    """The teacher: "world", a diffusers pipeline folder, or a Hub id; as `model.base` of the training."""
    prompts: tuple[str, ...]
    """Files of prompts (.txt, .jsonl, .csv, .tsv, .parquet), or "world"; those that are held out too."""
    column: str = "prompt"
    """Name of the column (or JSON key) with the prompts."""
    count: int = 8192
    """How many prompts of "world"; as `data.count`."""
    held_out_count: int = 64
    """How many held-out ones of "world"; as `data.held_out_count`."""
    seed: int = 0
    """Seed of the training, for "world"."""
    out: Path = Path("out/embeddings")
    """Folder for the shards."""
    max_sequence_length: int | None = None
    """Text tokens; None lets the family decide; as `data.max_sequence_length`."""
    stored: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    """Precision on the disk; float8 has a scale for every token."""
    shard: int = 1024
    """Prompts in a file."""
    batch: int = 16
    """Prompts at a time."""
    device: config.Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: config.Dtype | Literal["auto"] = "auto"
    """Precision of the text encoders; auto takes bfloat16 on cuda, else float32."""

    def run(self) -> None:
        from functools import partial

        from arcflow.data import batches, cache
        from arcflow.data.embeddings import embedded
        from arcflow.data.prompts import read_prompts
        from arcflow.families import network
        from arcflow.sampling import folder
        from arcflow.system.owner import owned_share

        texts: list[str] = []
        for name in self.prompts:
            if name == SHIPPED:
                drawn = config.Data(count=self.count, held_out_count=self.held_out_count)
                train, held, _ = batches.prompt_sets(drawn, self.seed)
                texts += [row.text for row in (*train, *held)]
                continue
            rows, message = read_prompts(name, self.column)
            texts += [row.text for row in rows]
            if message:
                print(message, file=sys.stderr)
        share = folder.share_of_work()
        with owned_share(self.out, share, "makes embeddings"):
            pass  # a folder that cannot be had is told before a large model is read
        pipe = open_pipe(self.model, self.device, self.dtype)
        cache.make(
            self.out,
            partial(network.encode_text, pipe, max_sequence_length=self.max_sequence_length),
            texts,
            about=embedded(self.model, self.max_sequence_length),
            dtype=self.stored,
            shard=self.shard,
            batch=self.batch,
            share=share,
        )
        print(f"embeddings: {self.out}; train with --data.embeddings {self.out}")


@dataclass(frozen=True, kw_only=True)
class CacheVerify:
    """Hold every shard of a cache against its checksum."""

    folder: Positional[Path]
    """The cache."""

    def run(self) -> None:
        from arcflow.data.cache import verify

        flaws = verify(self.folder)
        print("\n".join(flaws) or f"{self.folder}: whole")
        if flaws:
            raise SystemExit("run the same `arcflow cache make` again: it makes these shards, and only these")


@dataclass(frozen=True)
class CacheCommand:
    """Embeddings of prompts on disk."""

    command: Annotated[CacheMake, subcommand("make")] | Annotated[CacheVerify, subcommand("verify")]

    def run(self) -> None:
        self.command.run()
