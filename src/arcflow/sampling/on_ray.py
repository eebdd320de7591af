"""Many images by many workers: Ray Data over shards.

Each worker opens the model once and draws shard after shard. When one dies Ray starts another, which draws the shard
again that was lost; when all of it ends, the same command goes on from the shards that are there. Nothing is lost, and
no image is in two shards, for a shard is written at once under a name that its images decide.
"""

# pyright: reportMissingImports=false
# Ray is an extra that few have.

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayTaskError
from tqdm import tqdm

from arcflow.data.prompts import ListedPrompt
from arcflow.sampling.folder import Recipe, batches, drawn, png
from arcflow.sampling.generate import stock_euler
from arcflow.sampling.open import Setup, settle
from arcflow.sampling.options import Drawing, Fleet, Machine, ModelAndAdapter
from arcflow.sampling.shards import Kind, Shards, Shot, key_of
from arcflow.system.cluster import gpus_of_a_worker, workers_that_fit

Batch = Mapping[str, np.ndarray]
"""Rows of a data set, by column."""


@dataclass(frozen=True, kw_only=True)
class WorkerOrder:
    """What a worker must know."""

    subject: ModelAndAdapter
    drawing: Drawing
    machine: Machine
    where: str
    """The folder of the shards."""
    kind: Kind
    per_shard: int
    folder: str
    """In which the command runs, where paths begin."""

    def settled(self) -> Setup:
        """What is drawn with, as this node has it; paths begin where they do for the command."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        return settle(self.subject, self.drawing, self.machine)


def sample_on_ray(
    job: WorkerOrder, rows: Sequence[ListedPrompt], seeds: Sequence[int], fleet: Fleet
) -> tuple[int, int]:
    """How many images are new, and how many there are to be; Ray is joined already.

    Raises:
        ValueError: what a worker refuses, in its words.
    """
    shards = Shards(job.where, job.kind)
    gpus = gpus_of_a_worker(fleet.gpus)
    size = {"num_cpus": fleet.cpus, "num_gpus": gpus}
    workers = workers_that_fit(fleet.workers, fleet.cpus, gpus)
    try:
        # A worker knows which device and precision it has; the machine that the command runs on may have none.
        recipes = list(dict.fromkeys(ray.get(ray.remote(_recipes).options(**size).remote(job, rows, seeds))))
        there = shards.keys()
        missing = [recipe for recipe in recipes if key_of(recipe) not in there]
        lots = batches(missing, job.per_shard)
        if not lots:
            return 0, len(recipes)
        DataContext.get_current().enable_progress_bars = False
        items = [{"recipes": json.dumps([asdict(recipe) for recipe in lot])} for lot in lots]
        data = ray.data.from_items(items, override_num_blocks=min(len(items), 10_000)).map_batches(
            Draw,
            batch_size=1,
            compute=ActorPoolStrategy(size=min(workers, len(lots))),
            fn_constructor_args=(job,),
            **size,
        )
        new = 0
        with tqdm(total=len(missing), desc="sampling", unit="image", disable=None) as bar:
            for row in data.iter_rows():
                new += row["images"]
                bar.update(row["images"])
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, ValueError) else None
        raise cause or ValueError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from error
    return new, len(recipes)


def _recipes(job: WorkerOrder, rows: Sequence[ListedPrompt], seeds: Sequence[int]) -> list[Recipe]:
    return job.settled().recipes(rows, seeds)


class Draw:
    """A worker: draws the images of a shard and writes it."""

    def __init__(self, job: WorkerOrder) -> None:
        self.job = job
        self.shards = Shards(job.where, job.kind)
        self.setup = job.settled()
        self.pipe = self.setup.open()
        self.stack = ExitStack()
        if not self.setup.adapter:
            self.stack.enter_context(stock_euler(self.pipe))

    def __call__(self, rows: Batch) -> dict[str, list[int]]:
        """How many images were drawn for each row, a shard."""
        return {"images": [self._shard([Recipe(**one) for one in json.loads(row)]) for row in rows["recipes"]]}

    def _shard(self, recipes: Sequence[Recipe]) -> int:
        if self.shards.has(recipes):  # a worker has written it, and died before it said so
            return len(recipes)
        self._check(recipes[0])
        shots = list[Shot]()
        for batch in batches(recipes, self.job.machine.batch):
            images, seconds = drawn(self.pipe, batch)
            shots += [
                Shot(recipe=recipe, png=png(image, recipe), seconds=seconds)
                for recipe, image in zip(batch, images, strict=True)
            ]
        self.shards.write(shots)
        return len(recipes)

    def _check(self, recipe: Recipe) -> None:
        """Raise ValueError if this node has another model than the one that the recipes are of."""
        here = self.setup.recipe(recipe.prompt, recipe.seed, height=recipe.height, width=recipe.width)
        if here != recipe:
            strange = [name for name, value in asdict(here).items() if value != asdict(recipe)[name]]
            raise ValueError(
                f"the node {os.uname().nodename} would draw with another {', '.join(strange)} than the others: "
                f"expected the same model, adapter and kind of device everywhere"
            )
