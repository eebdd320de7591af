"""The command line: one frozen dataclass per command, from which tyro makes the options and their help.

    arcflow demo      distil the shipped small teacher, compare, write a report
    arcflow train     distil with a recipe: world, world-quick, flux, flux-24gb, qwen-image, ...
    arcflow cache     embeddings of prompts on disk: make, verify
    arcflow sample    prompts to PNG files in a few steps
    arcflow evaluate  teacher, plain Euler and student side by side
    arcflow export    an adapter in either layout, with a model card; on the Hub if wanted
    arcflow world     the built-in world: render, check, train and score its teacher
    arcflow doctor    what is here, what is missing, how to get it

Nothing heavy is imported before a command runs, so help is instant. A `ValueError` is a message for the user and is
printed without a traceback (`python -X dev -m arcflow.cli ...` shows it).
"""

import ctypes
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, UseAppendAction, subcommand

from arcflow import __version__, config, suite_command
from arcflow.world.commands import FIRST_SEED, World, held_out

SHIPPED = "world"
"""Name of what comes with the package: the small teacher, and its adapter."""
RECIPES = {
    "world": config.world(),
    "world-quick": config.world_quick(),
    "flux": config.flux(),
    "flux-48gb": config.flux_48gb(),
    "flux-24gb": config.flux_24gb(),
    "qwen-image": config.qwen_image(),
    "qwen-image-48gb": config.qwen_image_48gb(),
}
ABOUT_RECIPES = {
    "world": "The shipped small teacher, as well as it goes: 90 minutes on two CPU cores.",
    "world-quick": "The same in seven minutes; what `arcflow demo` trains.",
    "flux": "FLUX.1-dev with the published settings. Needs --data.prompts FILE and large GPUs.",
    "flux-48gb": "FLUX.1-dev on one card of 48 GB: small batches, text encoders on the CPU.",
    "flux-24gb": "FLUX.1-dev on one card of 24 GB: the same, the base in nf4.",
    "qwen-image": "Qwen-Image with the published settings. Needs --data.prompts FILE and large GPUs.",
    "qwen-image-48gb": "Qwen-Image on one card of 48 GB: small batches, the base in nf4.",
}


if TYPE_CHECKING:
    Recipe = config.Run
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(RECIPES, ABOUT_RECIPES)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Distil the shipped small FLUX into two steps and show it beside its teacher: under ten minutes on two cores."""

    quick: bool = False
    """A taste of it in about a minute: few iterations, few prompts, a poor student."""
    out: Path = Path("out/demo")
    """Folder for report.html, results.json and the run. Called again, it goes on where it stopped."""

    def run(self) -> None:
        from arcflow.train import train

        keep_buffers()
        recipe = dataclasses.replace(config.world_quick(), out=str(self.out / "run"))
        if self.quick:
            recipe = shorten(recipe)
        folder = train(recipe)
        Evaluate(adapter=str(folder / "adapter"), count=24 if self.quick else 384, out=self.out).run()


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


@dataclass(frozen=True, kw_only=True)
class Train:
    """Distil a teacher with a recipe; every setting of the recipe can be overridden."""

    recipe: Recipe
    """Where the settings come from."""

    def run(self) -> None:
        from arcflow.train import train

        if self.recipe.model.base == SHIPPED:
            keep_buffers()
        folder = train(self.recipe)
        print(f"adapter: {folder / 'adapter'}")


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
class Sample:
    """Turn prompts into PNG files in a few steps. What the folder's manifest lists already is not drawn again."""

    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompts: Path | None = None
    """File of prompts: .txt, one a line, or .jsonl, .csv, .tsv or .parquet with a column "prompt"."""
    model: str = SHIPPED
    """Teacher: "world" for the shipped small one, a diffusers pipeline folder, or a Hub id."""
    adapter: str = SHIPPED
    """Adapter folder or Hub "owner/name:subfolder"; "world" for the one shipped for the shipped teacher, "none" to
    sample the teacher itself in plain Euler steps."""
    steps: int = 2
    """Network calls per image."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise; every prompt is drawn with each of them."""
    out: Path = Path("out/samples")
    """Folder for the pictures and manifest.jsonl."""
    height: int | None = None
    """Height in pixels; by default 64 for the shipped teacher, else 1024."""
    width: int | None = None
    """Width in pixels; by default the height."""
    guidance: float | None = None
    """Guidance; by default what the adapter was distilled with, or the model is meant for."""
    batch: int = 8
    """Images at a time."""
    device: config.Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: config.Dtype | Literal["auto"] = "auto"
    """Precision of the weights; auto takes bfloat16 on cuda, else float32."""

    def run(self) -> None:
        texts = [*self.prompt]
        if self.prompts:
            from arcflow.prompts import read_prompts

            rows, message = read_prompts(self.prompts)
            texts += [row.text for row in rows]
            if message:
                print(message, file=sys.stderr)
        if not texts:
            raise ValueError("no prompt given; add --prompt TEXT (several times if you like) or --prompts FILE")
        from contextlib import nullcontext

        from arcflow import sample

        adapter, guidance = adapter_of(self.model, self.adapter), self.guidance
        if adapter and guidance is None:
            from arcflow.adapter import read_info

            guidance = read_info(adapter).guidance
        pipe = open_pipe(self.model, self.device, self.dtype)
        height, width = size_of(self.model, self.height, self.width)
        recipes = [
            sample.Recipe(
                prompt=text,
                seed=seed,
                steps=self.steps,
                height=height,
                width=width,
                guidance=guidance,
                model=self.model,
                adapter=self.adapter,
                version=__version__,
            )
            for text in texts
            for seed in self.seeds
        ]
        if adapter:
            from arcflow.pipeline import attach

            attach(pipe, adapter, fuse=True)
        with nullcontext() if adapter else sample.euler(pipe):
            new = sample.sample_folder(pipe, recipes, self.out, batch_size=self.batch, share=sample.share_of_work())
        for path in new:
            print(path)
        there = len(sample.read_manifest(self.out))
        print(f"{len(new)} new pictures; {there} of {len(set(recipes))} are listed in {self.out}/manifest*.jsonl")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Teacher at 50 steps, plain Euler at 2, 4, 8 and the student at 1, 2, 4, on held-out prompts of the world; with
    --suite NAME a benchmark: `arcflow evaluate --suite world --help`."""

    adapter: str = SHIPPED
    """Adapter of the small teacher: "world" for the shipped one, or a folder."""
    count: int = 384
    """Held-out prompts."""
    seeds: int = 1
    """Pictures of each prompt."""
    out: Path = Path("out/evaluate")
    """Folder for results.json, report.html and path.png."""
    device: config.Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""

    def run(self) -> None:
        from arcflow import evaluate, report
        from arcflow.state import read_log
        from arcflow.world.check import accuracy
        from arcflow.world.scene import SIZE

        adapter = Path(adapter_of(SHIPPED, self.adapter))
        prompts = held_out(self.count)
        pipe = open_pipe(SHIPPED, self.device, "float32")
        size = {"height": SIZE, "width": SIZE}
        results, samples = evaluate.compare(
            pipe, adapter, prompts, judge=accuracy, seeds=self.seeds, first_seed=FIRST_SEED, progress=True, **size
        )
        about = evaluate.about(command=f"arcflow {' '.join(sys.argv[1:])}", adapter=self.adapter)
        evaluate.save_results({**results, "about": about}, self.out / "results.json")
        ways = [evaluate.tracks(pipe, adapter, text, FIRST_SEED + i * self.seeds, **size) for i, text in three(prompts)]
        log = adapter.parent / "log.jsonl"
        words = [text for text in prompts for _ in range(self.seeds)]
        curves = read_log(log) if log.exists() else []
        report.write_report(self.out / "report.html", results, samples, words, ways, curves, about=about)
        for row, result in results.items():
            share = result["accuracy"]["overall"]
            print(f"{row:<12}{result['nfe']:>3} calls   distance {result['mse_to_teacher']:.4f}   accuracy {share:.1%}")
        print(f"report: {self.out / 'report.html'}\nnumbers: {self.out / 'results.json'}")


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


def three(prompts: Sequence[str]) -> list[tuple[int, str]]:
    """The images whose paths the report draws: of the first six, one for each skill, every other one."""
    return list(enumerate(prompts))[:6][::2]


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Report versions, devices and memory, and say what is missing and how to get it."""

    model: Literal["flux", "qwen_image", "flux2"] | None = None
    """Say instead how this large model fits cards of 12 to 80 GB."""

    def run(self) -> None:
        from arcflow.doctor import diagnose, fit

        if self.model:
            return fit(self.model, print)
        raise SystemExit(0 if diagnose(print) else 1)


def keep_buffers() -> None:
    """Let glibc keep what is freed: else it hands every large buffer back and asks for it anew in each iteration, which
    is an eighth of an iteration on a CPU (docs/log.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no buffer of its own mapping
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def adapter_of(model: str, adapter: str) -> str:
    """Where the adapter is; "" when the teacher itself is wanted."""
    if adapter == "none":
        return ""
    if adapter != SHIPPED:
        return adapter
    if model != SHIPPED:
        raise ValueError(f"no adapter given for {model}; add --adapter FOLDER (or owner/name:subfolder, or none)")
    folder = Path(__file__).parent / "assets" / "adapter"
    if not folder.is_dir():
        raise ValueError(f"no adapter in {folder}; make one with `arcflow train world` and give --adapter FOLDER")
    return str(folder)


def open_pipe(model: str, device: str, dtype: str) -> Any:
    """The teacher's pipeline on its device."""
    from arcflow.loading import load_pipe, torch_device

    where = torch_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    return load_pipe(config.Model(base=model, dtype=dtype)).to(where)  # type: ignore[arg-type]


def open_transformer(model: str, family: str) -> Any:
    """A base's transformer alone, on the CPU."""
    if model == SHIPPED:
        return open_pipe(model, "cpu", "float32").transformer
    import diffusers
    import torch

    from arcflow.backbone import FAMILIES
    from arcflow.hub import explained

    row = next(row for row in FAMILIES if row.name == family)
    with explained(model):
        return getattr(diffusers, row.transformer).from_pretrained(model, subfolder="transformer", dtype=torch.bfloat16)


def size_of(model: str, height: int | None, width: int | None) -> tuple[int, int]:
    """Image size in pixels, completed by the model's own."""
    side = height or width or (64 if model == SHIPPED else 1024)
    return height or side, width or side


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Train, subcommand("train")]
    | Annotated[CacheCommand, subcommand("cache")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Export, subcommand("export")]
    | Annotated[World, subcommand("world")]
    | Annotated[Doctor, subcommand("doctor")]
)
CHOICES = {
    (): ["demo", "train", "cache", "sample", "evaluate", "export", "world", "doctor"],
    ("train",): [*RECIPES],
    ("cache",): ["make", "verify"],
    ("world",): ["render", "check", "train", "score"],
}
"""Commands and what may follow them, for `did_you_mean`."""


def did_you_mean(words: Sequence[str]) -> str | None:
    """A message when a command is misspelt; None when all of them are known."""
    for before, known in CHOICES.items():
        depth = len(before)
        if tuple(words[:depth]) != before or len(words) <= depth or words[depth].startswith("-"):
            continue
        word = words[depth]
        if word not in known:
            close = difflib.get_close_matches(word.replace("_", "-"), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
            return f"{' '.join(('arcflow', *before))}: no {word!r} here; {hint}"
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what a user can put right is told in a line, not in a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"arcflow {__version__}")
        return
    if message := did_you_mean(words):
        print(message, file=sys.stderr)
        raise SystemExit(2)
    summary = "Few-step text-to-image: distil a flow-matching model so that two network calls draw what took fifty."
    if suite_command.asked(words):
        command = tyro.cli(suite_command.EvaluateSuite, prog="arcflow evaluate", args=words[1:])
    else:
        command = tyro.cli(Command, prog="arcflow", description=summary, args=words, config=(OmitSubcommandPrefixes,))
    try:
        command.run()
    except ValueError as error:
        if sys.flags.dev_mode:
            raise
        print(f"arcflow: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
