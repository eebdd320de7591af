"""One training of one method on the bench that all methods share, and what its student is worth.

An `Entrant` is a method with what it changes in the settings. `train` gives it the common network (the shipped small
FLUX with a LoRA and a head of K modes), the common prompts and noise, AdamW, averaging, and a budget counted in
forward-equivalents (`baselines.method`), not in iterations: a method that asks the teacher often takes fewer steps.
Rates follow the share of the budget that is spent. `judge` samples held-out prompts from the noise that the teacher's
own pictures came from, and keeps a number for each picture, so that everything can be averaged later.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from arcflow import backbone, student
from arcflow.backbone import Cond
from arcflow.baselines.method import Cost, Method, Sampler, Training, Turn
from arcflow.config import Data, Distill, Model, Optim, Run
from arcflow.data import PromptData, Table
from arcflow.features import world_features
from arcflow.loading import load_pipe, torch_device
from arcflow.metrics import diversity, squared_error
from arcflow.optim import adamw, rate, set_rate, step_directions
from arcflow.path import step_grid
from arcflow.rollout import Student, Teacher, euler
from arcflow.rules import Contest
from arcflow.state import Ema, ema_beta, seed_of
from arcflow.world import check
from arcflow.world.commands import FIRST_SEED, held_out
from arcflow.world.scene import SIZE

TEACHER_STEPS = 50
PARTS = 1000
"""Warm-up and cooldown are in thousandths of the budget."""
CURVE = 64
"""Held-out prompts on which the distance is measured while a training goes on."""
MEASURED = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the budget at which it is."""
SHOWN = 8
"""Pictures that are kept to look at."""
BATCH = 64
ALIKE_SEED = 900_000
"""Noise of the first picture that is drawn for the diversity."""
End = Callable[[Tensor, Cond, torch.Generator], Tensor]
"""(noise, conditioning, random numbers) -> final latents."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A method, and its own settings where they differ from those of all."""

    method: Method
    name: str = ""
    """As it goes by in files; by default the method's."""
    title: str = ""
    distill: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    """Parts of the head that are not trained: "logweights", "loggamma"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.method.name)
        object.__setattr__(self, "title", self.title or self.method.title)


def settings(contest: Contest, entrant: Entrant, calls: int, seed: int) -> Run:
    """The run that a training of this entrant is. Walks are the teacher's as closely as they come at no more calls."""
    model = Model(base=contest.model, modes=entrant.method.modes, rank=contest.rank, dropout=0.0, targets="all")
    distill = Distill(steps=calls, spread="stratified", solver="adams", handover="student")
    optim = Optim(
        iterations=PARTS,
        batch=contest.batch,
        lr=contest.lr,
        lr_log_gamma=contest.lr / 100,
        warmup=20,
        cooldown="cosine",
        cooldown_iterations=600,
        clip_from=0,
    )
    return Run(
        seed=seed,
        model=replace(model, **entrant.model),
        distill=replace(distill, **entrant.distill),
        data=Data(count=contest.prompts, held_out_count=1),
        optim=replace(optim, **entrant.optim),
    )


@dataclass
class Reference:
    """The teacher's own pictures of the held-out prompts, and what they are drawn from."""

    latents: Float[Tensor, "count tokens width"]
    diversity: Float[Tensor, " alike"]
    """Mean distance between the pictures of each prompt that is drawn several times."""


class Bench:
    """The small teacher with everything that does not change from method to method."""

    def __init__(self, contest: Contest) -> None:
        self.contest = contest
        self.device = torch_device(contest.device)
        self.pipe: Any = load_pipe(Model(base=contest.model)).to(self.device)
        for part in (self.pipe.transformer, self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.eval()
        self.base = self.pipe.transformer
        self.prompts = held_out(contest.count)
        self.alike = [prompt for prompt in self.prompts[: contest.alike] for _ in range(contest.pictures)]
        texts = captions(contest, 1).train
        self.table = Table(partial(backbone.encode_text, self.pipe), [row.text for row in texts] + self.prompts)
        self.features = world_features()

    def cond(self, prompts: list[str]) -> Cond:
        """Conditioning at the guidance that students are distilled with."""
        text = {name: value.to(self.device) for name, value in self.table(prompts).items()}
        return backbone.place(self.pipe, text, height=SIZE, width=SIZE, guidance=Distill().guidance)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        return backbone.noise(self.pipe, list(seeds), SIZE, SIZE).to(self.device)

    def teacher(self, net: Any, cost: Cost) -> Teacher:
        def velocity(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            cost.add(len(x))
            if not student.is_student(net):
                with torch.no_grad():
                    return backbone.call(net, x, sigma, cond).float()
            return student.teacher_velocity(net, x, sigma, cond)

        return velocity

    def reference(self) -> Reference:
        """What the teacher draws in many steps; minutes on a CPU, so it is kept."""
        grid = step_grid(TEACHER_STEPS, Distill().shift)
        walk = partial(euler, self.teacher(self.base, Cost()), sigmas=grid)
        latents = self._each(lambda x, cond, generator: walk(x, cond), self.prompts, FIRST_SEED)
        alike = self._each(lambda x, cond, generator: walk(x, cond), self.alike, ALIKE_SEED)
        return Reference(latents, self._diversity(alike))

    def judge(self, end: End, reference: Reference) -> dict[str, Any]:
        """One number for each held-out picture that a sampler draws: squared distance to the teacher's final latents
        from the same noise, and whether it shows what its prompt says; the diversity over the teacher's; and the first
        pictures themselves. Latents that are not finite count as 0, and are counted."""
        latents = self._each(end, self.prompts, FIRST_SEED)
        broken = int((~latents.isfinite()).flatten(1).any(1).sum())
        latents = latents.nan_to_num(0.0, 0.0, 0.0)
        pictures = self.pictures(latents)
        alike = self._each(end, self.alike, ALIKE_SEED).nan_to_num(0.0, 0.0, 0.0)
        return {
            "distance": squared_error(latents, reference.latents).tolist(),
            "right": [check.judge(picture, text) for picture, text in zip(pictures, self.prompts, strict=True)],
            "diversity": float(self._diversity(alike).mean() / reference.diversity.mean()),
            "broken": broken,
            "pictures": pictures[:SHOWN],
        }

    def distance(self, end: End, reference: Reference) -> float:
        """Mean of the first few alone."""
        latents = self._each(end, self.prompts[:CURVE], FIRST_SEED)
        return float(squared_error(latents, reference.latents[: len(latents)]).mean())

    def _each(self, end: End, prompts: list[str], first_seed: int) -> Tensor:
        ends = []
        for start in range(0, len(prompts), BATCH):
            texts = prompts[start : start + BATCH]
            x = self.noise(range(first_seed + start, first_seed + start + len(texts)))
            generator = torch.Generator().manual_seed(first_seed + start)
            ends.append(end(x, self.cond(texts), generator).cpu())
        return torch.cat(ends)

    def _diversity(self, latents: Tensor) -> Tensor:
        return diversity(self.features(self.pictures(latents)), self.contest.pictures)

    def pictures(self, latents: Tensor) -> UInt8[np.ndarray, "count rows columns 3"]:
        """What final latents show."""
        parts = [backbone.decode(self.pipe, part.to(self.device), SIZE, SIZE) for part in latents.split(BATCH)]
        return np.concatenate(parts)


def captions(contest: Contest, batch: int) -> PromptData:
    """What everybody is trained on, whatever the seed."""
    return PromptData(Data(count=contest.prompts, held_out_count=1), seed=0, batch=batch)


def ender(sample: Sampler, walker: Student, distill: Distill, calls: int) -> End:
    """A sampler of a student, as `Bench.judge` wants it."""

    def end(x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        return sample(walker, x, cond, calls, distill, generator)

    return end


@dataclass
class Trained:
    """A student at the end of its budget, with the averaged weights in it."""

    net: Any
    walker: Student
    run: Run
    curve: list[tuple[int, float]]
    """Forward-equivalents spent, and the distance then."""
    iterations: int
    skipped: int
    seconds: float
    trained: int
    """Numbers that were trained."""


def train(bench: Bench, entrant: Entrant, calls: int, seed: int, reference: Reference) -> Trained:
    """Train until the budget is spent, measurements not counted."""
    contest, method, started = bench.contest, entrant.method, time.monotonic()
    run = settings(contest, entrant, calls, seed)
    net = copy.deepcopy(bench.base)
    torch.manual_seed(seed_of(seed, "contest"))
    student.build(
        net,
        modes=run.model.modes,
        rank=run.model.rank,
        dropout=run.model.dropout,
        targets=run.model.targets,
        generator=torch.Generator().manual_seed(seed_of(seed, "student")),
    )
    parameters = {
        n: p for n, p in student.trainable(net).items() if not any(f"_{part}." in n for part in entrant.frozen)
    }
    for name, parameter in student.trainable(net).items():
        parameter.requires_grad_(name in parameters)
    average, optimizer, turned = Ema(parameters), adamw(parameters, run.optim), step_directions(parameters, run)
    cost = Cost()

    def walker(x: Tensor, sigma: Tensor, cond: Cond) -> Any:
        cost.add(len(x), backward=torch.is_grad_enabled())
        return student.predict(net, x, sigma, cond)

    objective = method.objective(run.distill, Training(net, average, cost))
    data = captions(contest, run.optim.batch)
    data.seed = seed  # their order, and the noise
    teacher, end = bench.teacher(net, cost), ender(method.sample, walker, run.distill, calls)
    curve, skipped, step, apart = list[tuple[int, float]](), 0, 0, 0.0
    net.train()
    while cost.spent < contest.budget:
        batch, done = data.batch(step), cost.spent / contest.budget
        generator = torch.Generator().manual_seed(seed_of(seed, "draws", step))
        for part in objective(
            walker, teacher, bench.noise(batch.seeds), bench.cond(batch.prompts), Turn(done, generator)
        ):
            part.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), run.optim.clip)
        if bool(norm.isfinite()):
            set_rate(optimizer, rate(int(done * PARTS), run.optim))
            with turned():
                optimizer.step()
            average.update(ema_beta(step, 20, run.optim.ema_power))
        else:
            skipped += 1
        optimizer.zero_grad()
        step += 1
        due = [share for share in MEASURED[len(curve) :] if cost.spent >= share * contest.budget]
        if due:
            kept, measured = cost.spent, time.monotonic()
            net.eval()
            with average.applied(), torch.no_grad():
                curve += [(kept, bench.distance(end, reference))] * len(due)
            net.train()
            cost.spent, apart = kept, apart + time.monotonic() - measured
    average.swap()
    net.eval()
    seconds = time.monotonic() - started - apart
    return Trained(net, walker, run, curve, step, skipped, seconds, sum(p.numel() for p in parameters.values()))
