"""`arcflow demo`: distill the shipped small teacher, then show it beside its student."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from arcflow import config, recipes
from arcflow.commands.evaluate import Evaluate
from arcflow.commands.train import Train
from arcflow.evaluation.request import Request
from arcflow.sampling.options import ModelAndAdapter


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Distill the shipped small FLUX into two steps and show it beside its teacher: under ten minutes on two cores."""

    quick: bool = False
    """A taste of it in about a minute: few iterations, few prompts, a poor student."""
    out: Path = Path("out/demo")
    """Folder for report.html, results.json and the run. Called again, it goes on where it stopped."""

    def run(self) -> None:
        recipe = dataclasses.replace(recipes.world_quick(), out=str(self.out / "run"))
        Train(recipe=shorten(recipe) if self.quick else recipe, processes=on_cores(recipe.optim.batch)).run()
        adapter = str(self.out / "run" / "adapter")
        count = 24 if self.quick else None
        Evaluate(request=Request(subject=ModelAndAdapter(adapter=adapter), count=count, out=self.out)).run()


def on_cores(batch: int) -> int:
    """How many processes train a small network best here: one on a GPU, else up to four that divide a batch."""
    from arcflow.system.devices import cores, torch_device

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
