"""`arcflow train`: distill a teacher with a recipe."""

import json
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import tyro

from arcflow import config, recipes
from arcflow.sampling.open import SHIPPED

RECIPES = {name: make() for name, make in recipes.RECIPES.items()}

ABOUT_RECIPES = {name: make.__doc__ or "" for name, make in recipes.RECIPES.items()}

if TYPE_CHECKING:
    Recipe = config.Run
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(RECIPES, ABOUT_RECIPES)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Distill a teacher with a recipe; every setting of the recipe can be overridden."""

    recipe: Recipe
    """Where the settings come from."""
    processes: int = 1
    """Number of processes at once, on CPU cores, each with a copy of the network, which is faster than as many threads.
    Several GPUs or machines: `torchrun`."""

    def run(self) -> None:
        config.check(self.processes >= 1, "processes", self.processes, "1 or more", "leave it out for one")
        if self.processes > 1:
            code = train_together(self.recipe, self.processes)
            if code:
                raise SystemExit(code)
            return
        from arcflow.system.devices import keep_buffers
        from arcflow.system.signals import Stopped
        from arcflow.training.loop import train

        if self.recipe.model.base == SHIPPED:
            keep_buffers()
        try:
            folder = train(self.recipe)
        except Stopped as stopped:  # the loop has said how to go on
            raise SystemExit(stopped.code) from None
        print(f"adapter: {folder / 'adapter'}")


def train_together(run: config.Run, count: int) -> int:
    """Exit code of a training in `count` new processes of this machine, each with a whole copy of the network.

    Raises ValueError, before any process starts, if a batch does not divide among them.
    """
    from arcflow.system.launch import run_together
    from arcflow.system.processes import Ranks

    Ranks(count=count).rows(run.optim.batch)
    run = replace(run, shard=run.shard or 1)
    settings = json.loads(config.to_json(run))
    command = recipes.command({name: value for name, value in settings.items() if name != "out"})
    return run_together([*shlex.split(command)[1:], "--out", run.out], count)
