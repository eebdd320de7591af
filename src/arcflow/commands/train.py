"""`arcflow train`: distill a teacher with a recipe."""

import io
import json
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
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
        _check_lists(self.recipe.data)
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
        if isinstance(sys.stdout, io.TextIOWrapper):  # a line is in the log as soon as it is said
            sys.stdout.reconfigure(line_buffering=True)
        try:
            folder = train(self.recipe)
        except Stopped as stopped:  # the loop has said how to go on
            raise SystemExit(stopped.code) from None
        if os.environ.get("RANK", "0") == "0":
            _report(folder)
        if (folder / "adapter").is_dir():
            told = "" if self.recipe.model.base == SHIPPED else f" --model {self.recipe.model.base}"
            print(f"adapter: {folder / 'adapter'}")
            print(f"look at it: arcflow evaluate{told} --adapter {folder / 'adapter'}")


def _report(folder: Path) -> None:
    """Put a page about the training into its folder; what stands in the way of it is no reason to fail."""
    from arcflow.reports.training import write_training

    try:
        page = write_training(folder)
    except (OSError, ValueError) as error:
        print(f"no report of the training: {error}", file=sys.stderr)
        return
    if page:
        print(f"report: {page}")


def _check_lists(data: config.Data) -> None:
    """Refuse a list of prompts that is not there, before torch is imported."""
    for option, name in (("--data.prompts", data.prompts), ("--data.held-out", data.held_out)):
        if name and name.lower().endswith(config.PROMPT_FILES) and not Path(name).exists():
            raise ValueError(
                f"{option}: no prompt file {name!r}; `arcflow prompts --out {name}` writes one to begin with"
            )


def train_together(run: config.Run, count: int) -> int:
    """Exit code of a training in `count` new processes of this machine, each with a whole copy of the network.

    Raises ValueError, before any process starts, if a batch does not divide among them.
    """
    from arcflow.system.launch import run_together
    from arcflow.system.processes import Ranks

    Ranks(count=count).rows(run.optim.batch)
    run = replace(run, shard=run.shard or 1)
    settings = json.loads(config.to_json(run))
    command = recipes.run_command({name: value for name, value in settings.items() if name != "out"})
    return run_together([*shlex.split(command)[1:], "--out", run.out], count)
