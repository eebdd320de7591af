"""`arcflow sample`: prompts to PNG files."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, UseAppendAction

from arcflow.config import check
from arcflow.sampling.open import SHIPPED, check_drawing, settle
from arcflow.sampling.options import Drawing, Fleet, Machine, ModelAndAdapter, unset

if TYPE_CHECKING:
    from arcflow.data.prompts import ListedPrompt


@dataclass(frozen=True, kw_only=True)
class Sharding:
    shards: Annotated[str | None, unset("URL")] = None
    """With --ray: where the shards go, a folder or any store that fsspec knows (s3://, gs://, hf://); by default
    OUT/shards."""
    shard_format: Literal["parquet", "tar"] = "parquet"
    """With --ray: parquet with the recipes in columns, or tar as webdataset reads it."""
    per_shard: int = 64
    """With --ray: images of a shard; a worker that dies loses one."""


FEW = 6
"""Captions of the small world that are drawn where nobody says what: one of each skill."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Turn prompts into PNG files in a few steps, and a page that shows them. What the folder's manifest lists already
    is not drawn again."""

    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompts: Annotated[Path | None, unset("FILE")] = None
    """File of prompts: .txt, one a line, or .jsonl, .csv, .tsv or .parquet with a column "prompt", and "height" and
    "width" if the images have sizes of their own."""
    image: Annotated[Path | None, unset("FILE")] = None
    """An image to edit, for which every prompt is an instruction: FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit."""
    sources: FlagCreatePairsOff[bool] = False
    """The prompts of the file are instructions, each for the image that its column "source" names."""
    seed: UseAppendAction[tuple[int, ...]] = ()
    """Seed of the noise, by default 0; may be given several times, every prompt is drawn with each of them."""
    out: Path = Path("out/samples")
    """Folder for the images, manifest.jsonl and index.html, which shows them all."""
    json: bool = False
    """Print what was drawn as JSON."""
    subject: Annotated[ModelAndAdapter, OmitArgPrefixes] = ModelAndAdapter()
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()
    machine: Annotated[Machine, OmitArgPrefixes] = Machine()
    fleet: Annotated[Fleet, OmitArgPrefixes] = Fleet()
    sharding: Annotated[Sharding, OmitArgPrefixes] = Sharding()

    def run(self) -> None:
        from contextlib import nullcontext

        check_drawing(steps=self.drawing.steps, batch=self.machine.batch, seeds=self.seed, prompts=self.prompt)
        rows = self._rows()
        self.fleet.check()
        if self.fleet.ray and any(row.source for row in rows):
            raise ValueError("images to edit are read on this machine alone: expected no --ray beside them")
        if self.fleet.ray:
            return self._on_ray(rows)
        if self.sharding.shards:
            raise ValueError("--shards are written by Ray's workers: expected --ray with it, or --out FOLDER")
        setup = settle(self.subject, self.drawing, self.machine)
        recipes = setup.recipes(rows, self.seed or (0,))
        from arcflow.reports.contact_sheet import INDEX, write_sheet
        from arcflow.sampling.folder import is_whole, read_manifest, sample_folder, share_of_work, to_draw
        from arcflow.sampling.generate import stock_euler
        from arcflow.system.files import sweep
        from arcflow.system.owner import owned_share

        share = share_of_work()
        new = list[Path]()
        missing = to_draw(recipes, self.out, share)
        sheet = self.out / INDEX
        if missing or _behind(sheet):
            with owned_share(self.out, share, "draws"):
                if share[1] == 1:  # of several, each would sweep the others' away
                    sweep(self.out)
                if missing:
                    pipe = setup.open()
                    with nullcontext() if setup.adapter else stock_euler(pipe):
                        new = sample_folder(pipe, recipes, self.out, batch_size=self.machine.batch, share=share)
                there = [record for record in read_manifest(self.out) if is_whole(self.out / record["file"])]
                write_sheet(self.out, there)
        if self.json:
            listed = [record for record in read_manifest(self.out) if record["file"] in {one.file for one in recipes}]
            print(json.dumps({"folder": str(self.out), "new": len(new), "images": listed}, indent=2))
            return
        for path in new:
            print(path)
        wanted = len(set(recipes))
        print(f"new images: {len(new)}; in {self.out}: {wanted - len(to_draw(recipes, self.out))} of {wanted}")
        print(f"all of them: {self.out / INDEX}", file=sys.stderr)

    def _rows(self) -> "list[ListedPrompt]":
        """The prompts, and the sizes that their file has for them."""
        from arcflow.data.prompts import ListedPrompt, read_prompts

        if self.image and self.sources:
            raise ValueError("--image is edited by every prompt, and --sources has an image for each: expected one")
        if self.sources and not self.prompts:
            raise ValueError("--sources: expected --prompts FILE with a column source beside it")
        rows = [ListedPrompt(text) for text in self.prompt]
        if self.prompts:
            listed, message = read_prompts(self.prompts, sources="files" if self.sources else "none")
            rows += [
                row._replace(source=str(self.prompts.parent / row.source)) if row.source else row for row in listed
            ]
            if message:
                print(message, file=sys.stderr)
        if not rows and self.subject.model == SHIPPED:
            from arcflow.world.scene import held_out

            print(f"no prompt given: {FEW} of the small world's; --prompt TEXT draws your own", file=sys.stderr)
            rows = [ListedPrompt(text) for text in held_out(FEW)]
        if self.image:
            rows = [row._replace(source=str(self.image)) for row in rows]
        if not rows:
            raise ValueError("no prompt given; add --prompt TEXT (several times if you like) or --prompts FILE")
        if self.subject.model == SHIPPED:
            _warn_of_strangers([row.text for row in rows])
        return rows

    def _on_ray(self, rows: "list[ListedPrompt]") -> None:
        """Shards, by Ray's workers."""
        from contextlib import nullcontext

        from arcflow.sampling.shards import Shards
        from arcflow.system.cluster import connected, need_ray
        from arcflow.system.owner import owned

        check(self.sharding.per_shard >= 1, "--per-shard", self.sharding.per_shard, "1 or more", "leave it out for 64")
        for seed in self.seed:
            check(seed < 2**63, "--seed", seed, "one below 2^63 for shards", "take a smaller one")
        where = self.sharding.shards or str(self.out.absolute() / "shards")
        shards = Shards(where, self.sharding.shard_format)
        need_ray("data", self.fleet.address)
        from arcflow.sampling.on_ray import WorkerOrder, sample_on_ray

        job = WorkerOrder(
            subject=self.subject,
            drawing=self.drawing,
            machine=self.machine,
            where=where,
            kind=self.sharding.shard_format,
            per_shard=self.sharding.per_shard,
            folder=str(Path.cwd()),
        )
        alone = owned(Path(shards.root), "draws") if shards.local else nullcontext()
        with alone, connected(self.fleet.address):
            new, wanted = sample_on_ray(job, rows, self.seed or (0,), self.fleet)
        print(f"new images: {new}; in {where}: {wanted} of {wanted}")


def _behind(sheet: Path) -> bool:
    """Whether a contact sheet is not there, or older than a manifest: who drew last was killed before writing it."""
    manifests = [path.stat().st_mtime for path in sheet.parent.glob("manifest*.jsonl")]
    return not sheet.exists() or sheet.stat().st_mtime < max(manifests, default=0.0)


def _warn_of_strangers(prompts: list[str]) -> None:
    """Say which prompts the shipped small model has never read the like of."""
    from arcflow.world.scene import parse

    strange = []
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError:
            strange.append(prompt)
    if strange:
        print(
            f"{len(strange)} of {len(prompts)} prompts are no captions of the small world, {strange[0]!r} first; "
            f'it draws something for them all the same. One that is: "a red ring left of a blue square on white"',
            file=sys.stderr,
        )
