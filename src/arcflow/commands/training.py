"""`arcflow train`, `cache`, `demo` and `export`: from prompts to an adapter that others can use."""

import ctypes
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, subcommand

from arcflow import config, recipes
from arcflow.commands.judging import Evaluate
from arcflow.commands.sampling import SHIPPED, open_pipe, open_transformer

RECIPES = {name: make() for name, make in recipes.RECIPES.items()}
ABOUT_RECIPES = {name: make.__doc__ or "" for name, make in recipes.RECIPES.items()}


if TYPE_CHECKING:
    Recipe = config.Run
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(RECIPES, ABOUT_RECIPES)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Distil a teacher with a recipe; every setting of the recipe can be overridden."""

    recipe: Recipe
    """Where the settings come from."""
    processes: int = 1
    """On CPU cores: so many processes at once, each with a copy of the network, which is faster than as many threads.
    Several GPUs or machines: `torchrun`."""

    def run(self) -> None:
        config.check(self.processes >= 1, "processes", self.processes, "1 or more", "leave it out for one")
        if self.processes > 1:
            from arcflow.together import train_together

            train_together(self.recipe, self.processes)
            return
        from arcflow.train import train

        if self.recipe.model.base == SHIPPED:
            keep_buffers()
        folder = train(self.recipe)
        print(f"adapter: {folder / 'adapter'}")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Distil the shipped small FLUX into two steps and show it beside its teacher: under ten minutes on two cores."""

    quick: bool = False
    """A taste of it in about a minute: few iterations, few prompts, a poor student."""
    out: Path = Path("out/demo")
    """Folder for report.html, results.json and the run. Called again, it goes on where it stopped."""

    def run(self) -> None:
        recipe = dataclasses.replace(recipes.world_quick(), out=str(self.out / "run"))
        Train(recipe=shorten(recipe) if self.quick else recipe, processes=on_cores(recipe.optim.batch)).run()
        adapter = str(self.out / "run" / "adapter")
        Evaluate(adapter=adapter, count=24 if self.quick else 384, out=self.out).run()


def on_cores(batch: int) -> int:
    """How many processes train a small network best here: one on a GPU, else up to four that divide a batch."""
    from arcflow.loading import torch_device
    from arcflow.together import cores

    most = min(4, cores()) if torch_device("auto").type == "cpu" else 1
    return next(count for count in range(most, 0, -1) if batch % count == 0)


def shorten(recipe: config.Run) -> config.Run:
    """The same recipe with just enough iterations to see that all parts work."""
    replace = dataclasses.replace
    return replace(
        recipe,
        eval_every=10,
        data=replace(recipe.data, count=256, held_out_count=8),
        optim=replace(recipe.optim, iterations=30, batch=16, warmup=5, cooldown_iterations=15),
        distill=replace(recipe.distill, hold=20, decay=5),
    )


def keep_buffers() -> None:
    """Let glibc keep what is freed: else it hands every large buffer back and asks for it anew in each iteration, which
    is an eighth of an iteration on a CPU (docs/log.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no buffer of its own mapping
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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

        from arcflow import backbone, cache, data, sample
        from arcflow.prompts import read_prompts

        texts: list[str] = []
        for name in self.prompts:
            if name == SHIPPED:
                drawn = config.Data(count=self.count, held_out_count=self.held_out_count)
                train, held, _ = data.prompt_sets(drawn, self.seed)
                texts += [row.text for row in (*train, *held)]
                continue
            rows, message = read_prompts(name, self.column)
            texts += [row.text for row in rows]
            if message:
                print(message, file=sys.stderr)
        pipe = open_pipe(self.model, self.device, self.dtype)
        cache.make(
            self.out,
            partial(backbone.encode_text, pipe, max_sequence_length=self.max_sequence_length),
            texts,
            about={"model": self.model, "max_sequence_length": self.max_sequence_length},
            dtype=self.stored,
            shard=self.shard,
            batch=self.batch,
            share=sample.share_of_work(),
        )
        print(f"embeddings: {self.out}; train with --data.embeddings {self.out}")


@dataclass(frozen=True, kw_only=True)
class CacheVerify:
    """Hold every shard of a cache against its checksum."""

    folder: Positional[Path]
    """The cache."""

    def run(self) -> None:
        from arcflow.cache import verify

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


@dataclass(frozen=True, kw_only=True)
class Export:
    """An adapter ready for others: in our layout or the authors', with a model card, and on the Hub if wanted."""

    adapter: str
    """Adapter folder, or Hub "owner/name:subfolder"."""
    out: Path = Path("out/export")
    """Folder to write: the adapter's files, README.md and the curves."""
    layout: Literal["arcflow", "published"] = "arcflow"
    """"arcflow" keeps all that sampling needs, "published" is what the authors' code reads (float16)."""
    model: str | None = None
    """The base, needed to change the layout: "world", a diffusers pipeline folder, or a Hub id."""
    results: Path | None = None
    """A results.json of `arcflow evaluate`, for the card."""
    push: str | None = None
    """Hub repository "owner/name" to put it in."""
    private: bool = False
    """Make that repository a private one."""

    def run(self) -> None:
        from arcflow import publish
        from arcflow.adapter import read_info

        if self.results and not self.results.is_file():
            raise ValueError(f"no file {self.results}: expected a results.json of `arcflow evaluate`; check --results")
        transformer = open_transformer(self.model, read_info(self.adapter).family) if self.model else None
        log = Path(self.adapter).parent / "log.jsonl"
        publish.export(
            self.adapter,
            self.out,
            layout=self.layout,
            transformer=transformer,
            log=log if log.is_file() else None,
            results=self.results,
            name=self.push or "path/to/adapter",
        )
        print(f"adapter and card: {self.out}")
        if self.push:
            print(f"pushed: {publish.push(self.out, self.push, private=self.private)}")
