"""Runs that have been thought through, by name: functions that return a whole `Run`.

All but two take the project's own objective (`own`), which was found by measurement on the small teacher that comes
with the package (docs/log.md): `world`, `world-one` and `world-quick` distil that teacher, the others take what won
there to large ones, for the forward passes of the published trainings. `flux-published` and `qwen-image-published`
carry the published values (arXiv 2602.09014 and the configuration released with it).
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from arcflow import paper
from arcflow.config import ALWAYS, PARTS, Budget, Data, Distill, Model, Optim, Run, flat, to_json
from arcflow.recipes import models
from arcflow.recipes.objective import forwards as forwards
from arcflow.recipes.objective import in_place_of, own, segment_states


def world() -> Run:
    """The shipped small teacher in two steps, the long recipe: 75 minutes on two CPU cores, at most 90."""
    run = Run(
        out="runs/world",
        eval_every=500,
        stop_after=88.0,
        model=Model(rank=32, dropout=0.0, targets="all"),
        data=Data(count=131_072),
        optim=Optim(
            iterations=4400,
            batch=32,
            lr=2e-3,
            lr_log_gamma=2e-5,
            warmup=20,
            cooldown="linear",
            cooldown_iterations=4200,
            clip_from=20,
            ema_from=20,
        ),
    )
    return own(run)


def world_one() -> Run:
    """The shipped small teacher in one step: as many minutes on two CPU cores as `world`, one call of the network."""
    replace, two = dataclasses.replace, world()
    run = replace(
        two,
        out="runs/world_one",
        distill=replace(two.distill, steps=1),
        optim=replace(two.optim, iterations=5600, cooldown_iterations=5400),
    )
    return own(run)


def world_quick() -> Run:
    """The shipped small teacher in two steps, as `arcflow demo` trains it: six to eight minutes on two CPU cores."""
    replace, long = dataclasses.replace, world()
    return replace(
        long,
        out="runs/world_quick",
        eval_every=100,
        save_every=200,
        stop_after=8.0,
        model=replace(long.model, rank=16),
        distill=replace(long.distill, reuse=2),
        data=replace(long.data, count=8192),
        optim=replace(long.optim, iterations=940, batch=16, cooldown_iterations=850),
    )


def comparison() -> Budget:
    """A training of `arcflow compare`: the shipped small teacher on a small budget, the same for every method.

    It is `world_quick` but for what a budget of 100 to 400 iterations, and methods that are to be compared, ask for.
    docs/comparing.md has every setting that differs; the reasons, measured in docs/log.md:

    * The teacher leads to the end. In so few iterations the student's own path costs more distance than it brings.
    * A walk is used several times (`reuse`). Asking the teacher is most of an iteration's cost, and it is iterations
      that are missing; in trainings as long as `world` fresh walks are better, kept ones are learned by heart.
    * As many states as an accurate walk needs (`states`), at stratified times.
    * Directions of a step are AdamW's own: those of the segment are made for ArcFlow's curves, and worse here.
    * A training that breaks goes on to its budget, so that its row has a number; skipped steps are counted.
    """
    run = Run(
        model=Model(rank=16, dropout=0.0, targets="all"),
        distill=Distill(
            states=states(2),
            spread="stratified",
            solver="adams",
            handover="student",
            reuse=reuse(24_000),
            hold=ALWAYS,
            decay=0,
        ),
        data=Data(count=8192, held_out_count=1),
        optim=Optim(
            iterations=PARTS,
            batch=16,
            lr=2e-3,
            lr_log_gamma=2e-5,
            warmup=20,
            cooldown="cosine",
            cooldown_iterations=600,
            clip_from=0,
            most_skipped=10**9,
            ema_from=20,
        ),
    )
    return Budget(run=run, forwards=24_000)


def states(calls: int) -> int:
    """States of a segment that leave the teacher's walk little error of its own: sixteen over the whole path, and four
    in every segment at least. With four states in the only segment of a one-call student, the walk's own error is what
    limits every method (docs/log.md)."""
    return segment_states(calls, 16)


def end(calls: int) -> float:
    """Share of the loss on the end of a step, on the comparison's budget: half in one call, where the end of the step
    is the image and half costs no distance; a fifth in more, where half buys nothing, on four times the budget neither
    (docs/log.md)."""
    return 0.5 if calls == 1 else 0.2


def reuse(budget: int) -> int:
    """How often a walk is used on a budget: eight times on 24 000 forward-equivalents, twice on four times as many, and
    once from 200 000 on. A walk that is used more often than that is learned by heart (docs/log.md)."""
    return max(8 * 24_000 // max(budget, 24_000), 1)


def flux_published() -> Run:
    """FLUX.1-dev with the published values. Needs --data.prompts FILE and large GPUs."""
    return Run(
        out="runs/flux_published",
        eval_every=500,
        save_every=250,
        log_every=10,
        model=Model(base="black-forest-labs/FLUX.1-dev", dtype="bfloat16", gradient_checkpointing=True),
        distill=Distill(decay=paper.FLUX_DECAY),
        data=Data(prompts="prompts.txt", held_out_count=16, height=1024, width=1024, cache=False),
        optim=Optim(iterations=paper.FLUX_ITERATIONS, batch=paper.BATCH, micro_batch=4),
    )


def qwen_image_published() -> Run:
    """Qwen-Image with the published values, true CFG 4 in the teacher. Needs --data.prompts FILE and large GPUs."""
    return Run(
        out="runs/qwen_image_published",
        eval_every=500,
        save_every=250,
        log_every=10,
        model=Model(base="Qwen/Qwen-Image", dtype="bfloat16", gradient_checkpointing=True),
        distill=Distill(decay=paper.QWEN_DECAY, teacher_cfg=paper.TRUE_GUIDANCE),
        data=Data(prompts="prompts.txt", held_out_count=16, height=1024, width=1024, cache=False),
        optim=Optim(iterations=paper.QWEN_ITERATIONS, batch=paper.BATCH, micro_batch=2),
    )


def flux() -> Run:
    """FLUX.1-dev in two steps: the project's own objective, for the forward passes of the published training. Needs
    --data.prompts FILE and large GPUs."""
    return in_place_of(dataclasses.replace(flux_published(), out="runs/flux"))


def qwen_image() -> Run:
    """Qwen-Image in two steps, true CFG 4 in the teacher: the project's own objective, for the forward passes of the
    published training. Needs --data.prompts FILE and large GPUs."""
    return in_place_of(dataclasses.replace(qwen_image_published(), out="runs/qwen_image"))


def flux_day() -> Run:
    """FLUX.1-dev in two steps at 512 x 512: about a day of one H100. Planned from the small bench, not run.

    In a day a card makes some 30 000 walks, a hundredth of the published training: as many as fit, of small images, in
    batches of 16.
    """
    replace, run = dataclasses.replace, flux()
    return replace(
        run,
        out="runs/flux_day",
        eval_every=250,
        model=replace(run.model, text_device="cpu"),
        distill=replace(run.distill, reuse=2, kept=16),  # 3.5 GB of the CPU's memory, and of a checkpoint
        data=replace(run.data, height=512, width=512),
        optim=replace(run.optim, iterations=3600, batch=16, micro_batch=4, spike=10.0),
    )


def flux_24gb() -> Run:
    """FLUX.1-dev on one card of 24 GB: as for 48 GB, with the base in nf4 and AdamW's moments in 8 bits."""
    run = _on_one_card(flux(), quantize="nf4", text_device="cpu")
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, bits=8))


def flux_48gb() -> Run:
    """FLUX.1-dev on one card of 48 GB: the base in bfloat16, the text encoders on the CPU, a small batch."""
    return _on_one_card(flux(), text_device="cpu")


def qwen_image_48gb() -> Run:
    """Qwen-Image on one card of 48 GB: the base in nf4, the text encoder on the CPU, a small batch."""
    return _on_one_card(qwen_image(), quantize="nf4", text_device="cpu")


RECIPES = {
    "world": world,
    "world-one": world_one,
    "world-quick": world_quick,
    "flux": flux,
    "flux-published": flux_published,
    "flux-day": flux_day,
    "flux-48gb": flux_48gb,
    "flux-24gb": flux_24gb,
    "qwen-image": qwen_image,
    "qwen-image-published": qwen_image_published,
    "qwen-image-48gb": qwen_image_48gb,
    **{name: models.recipe(name) for name in models.ROWS},
}
"""By the names they have on the command line."""


SCHEDULE = ("optim.warmup", "optim.cooldown_iterations", "distill.hold", "distill.decay")
"""Lengths in iterations that follow `optim.iterations` when the command line makes a run shorter."""


def _on_one_card(run: Run, **model: Any) -> Run:  # noqa: ANN401
    """Batches of 16, one sample at a time. The paper's authors: 8 to 16 converge."""
    replace = dataclasses.replace
    return replace(
        run,
        out=f"{run.out}_one_card",
        model=replace(run.model, **model),
        optim=replace(run.optim, iterations=2 * run.optim.iterations, batch=16, micro_batch=1, spike=10.0),
    )


def nearest(settings: Mapping[str, object]) -> str:
    """Name of the recipe that differs in the fewest of these settings."""
    wanted = flat(settings)
    return min(RECIPES, key=lambda name: len(_differing(wanted, name)))


def _differing(wanted: Mapping[str, object], recipe: str) -> dict[str, object]:
    """The settings that the recipe has otherwise."""
    there = flat(json.loads(to_json(RECIPES[recipe]())))
    return {name: value for name, value in wanted.items() if there.get(name, value) != value}


ALONE = ("fuse", "no_fuse")
"""Flags that have no `--no-`."""

REPEATED = ("prompt", "seed", "features", "scorer", "answers")
"""Options that are given once for each value; others take several behind them."""


def options(settings: Mapping[str, object]) -> list[str]:
    """Settings as words of a command line. A setting of a group may be None; a plain option is then left out."""
    words = list[str]()
    for name, value in settings.items():
        if isinstance(value, bool):
            if value or name not in ALONE:
                words.append(_flag(name, value))
        elif isinstance(value, list | tuple) and name not in REPEATED:
            words += [_option(name), *map(str, value)]
        elif value is not None or "." in name:
            for one in value if isinstance(value, list | tuple) else (value,):
                words += _with_value(_option(name), str(one))
    return words


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flag(name: str, on: bool) -> str:
    """The option that switches a setting on or off."""
    group, dot, last = _option(name).removeprefix("--").rpartition(".")
    return _option(name) if on else f"--{group}{dot}no-{last}"


def _with_value(option: str, value: str) -> list[str]:
    """An option and its value: one word where the value would read as an option of its own."""
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def run_command(settings: Mapping[str, object]) -> str:
    """The command line that makes these settings (all of a run's, but `out`): the nearest recipe and what differs."""
    recipe = nearest(settings)
    wanted = flat(settings)
    changed = _differing(wanted, recipe)
    if "optim.iterations" in changed:  # a run that is shortened shortens what is not said
        changed |= {name: wanted[name] for name in SCHEDULE if name in wanted}
    return shlex.join(["arcflow", "train", recipe, *options(changed)])
