"""Teacher, plain Euler and student of any model on a handful of prompts: the same prompts, the same noise.

No checker reads what is drawn, so there is no accuracy: what is measured is the distance to the teacher's final latents
and the time. Euler walks in as many steps as the student, on the same grid; the teacher is guided as it was when the
adapter was distilled from it.
"""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.evaluation.results import EvaluationAbout, Handful, Way
from arcflow.families.fit import fitted
from arcflow.metrics.intervals import bootstrap, prompt_means
from arcflow.sampling.attach import attach
from arcflow.sampling.folder import png
from arcflow.sampling.generate import Samples, generate, stock_euler
from arcflow.sampling.open import TEACHER_STEPS, Setup
from arcflow.system import files

WAYS = ("teacher", "euler", "student")
"""Who draws, in the order of the columns."""


def draw_ways(setup: Setup, prompts: Sequence[str], seeds: Sequence[int], batch: int) -> dict[str, Samples]:
    """The images of each of `WAYS`, one for each pair of prompt and seed.

    A model that is not all on the card is opened twice, for an adapter goes on it before it is fitted.
    """
    assert setup.info, "a student is compared"

    def drawn(pipe: DiffusionPipeline, steps: int, true_cfg: float | None) -> Samples:
        return generate(
            pipe,
            prompts,
            seeds,
            steps=steps,
            height=setup.height,
            width=setup.width,
            frames=setup.frames,
            batch_size=batch,
            guidance=setup.guidance,
            negative=setup.negative_prompt,
            true_cfg=true_cfg,
            progress=True,
        )

    pipe = setup.base()
    scale = _teacher_scale(setup)
    if setup.fit != "card":
        fitted(pipe, setup.fit, setup.device)
    samples = dict[str, Samples]()
    with stock_euler(pipe, setup.info.shift):
        samples["teacher"] = drawn(pipe, TEACHER_STEPS, scale)
        samples["euler"] = drawn(pipe, setup.steps, scale)
    if setup.fit == "card":
        attach(pipe, setup.adapter, fuse=setup.fused, guidance=setup.guided_twice)
    else:
        del pipe
        pipe = setup.open()
    samples["student"] = drawn(pipe, setup.steps, setup.true_cfg)
    return samples


def _teacher_scale(setup: Setup) -> float | None:
    """Scale of the teacher's second call: what is asked for, else what it was distilled at; None: the model's own."""
    if setup.true_cfg is not None or setup.info is None:
        return setup.true_cfg
    learned = setup.info.training.get("settings", {}).get("distill", {}).get("teacher_cfg")
    return learned if learned is not None and (learned > 1 or setup.family.guidance is None) else None


def measured(
    setup: Setup,
    samples: dict[str, Samples],
    prompts: Sequence[str],
    seeds: Sequence[int],
    images: int,
    about: EvaluationAbout,
) -> Handful:
    """The numbers of what was drawn: `images` of each prompt, in the order of `prompts`."""
    reference = samples["teacher"].latents

    def way(name: str) -> Way:
        one = samples[name]
        apart = (one.latents - reference).square().flatten(1).mean(1)
        low, high = _interval(apart, images)
        return Way(
            nfe=one.nfe,
            seconds_per_image=one.seconds_per_image,
            seconds={part: total / len(prompts) for part, total in one.seconds.items()},
            mse_to_teacher=float(apart.mean()),
            low=low,
            high=high,
        )

    return Handful(
        **{name: way(name) for name in WAYS},
        prompts=list(dict.fromkeys(prompts)),
        seeds=list(seeds),
        height=setup.height,
        width=setup.width,
        frames=setup.frames,
        guidance=setup.guidance,
        model=setup.subject.model,
        about=about,
    )


def _interval(values: Tensor, images: int) -> tuple[float | None, float | None]:
    """Ends of the interval over prompts; none of a single one."""
    means = prompt_means(values, images)
    if len(means) < 2 or not means.isfinite().all():
        return None, None
    found = bootstrap(means)
    return found.low, found.high


def keep(samples: dict[str, Samples], folder: Path) -> None:
    """Write every image whole, as 001-teacher.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in samples.items():
        for place, image in enumerate(drawn.images, 1):
            files.write_bytes(folder / f"{place:03d}-{name}.png", png(image))
