"""One training of one method on the bench that all methods share, and what its student is worth.

An `Entrant` is a method with what it changes in the settings. `train_entrant` gives it the common network (the
subject's small FLUX with a LoRA and a head of K modes), the common prompts and noise, AdamW, averaging, and a budget
counted in forward-equivalents (`distillation.method`), not in iterations: a method that asks the teacher often takes
fewer steps. Rates follow the share of the budget that is spent. `measure` samples held-out prompts from the noise that
the teacher's own images came from, and keeps a number for each image, so that everything can be averaged later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arcflow import paper
from arcflow.comparison.config import SHOWN, Plan
from arcflow.comparison.results import Measured
from arcflow.comparison.subject import WORLD, Subject
from arcflow.config import Distill
from arcflow.data.batches import PromptData
from arcflow.data.embeddings import EmbeddedPrompts
from arcflow.distillation.method import Cost
from arcflow.distillation.policy import Teacher
from arcflow.distillation.walk import euler
from arcflow.families import network
from arcflow.families.conditioning import Cond
from arcflow.metrics.images import diversity, squared_error
from arcflow.path import step_grid
from arcflow.student import views
from arcflow.student.state import is_student
from arcflow.system.devices import torch_device
from arcflow.world.scene import FIRST_SEED

TEACHER_STEPS = paper.TEACHER_STEPS

CURVE = 64
"""Held-out prompts on which the distance is measured while a training goes on."""

BATCH = 64

ALIKE_SEED = 900_000
"""Noise of the first image that is drawn for the diversity."""

End = Callable[[Tensor, Cond, torch.Generator], Tensor]
"""(noise, conditioning, random numbers) -> final latents."""


@dataclass
class TeacherImages:
    """The teacher's own images of the held-out prompts, and what they are drawn from."""

    latents: Float[Tensor, "count tokens width"]
    diversity: Float[Tensor, " alike"]
    """Mean distance between the images of each prompt that is drawn several times."""


class Bench:
    """The small teacher with everything that does not change from method to method."""

    def __init__(self, plan: Plan, subject: Subject = WORLD) -> None:
        self.plan, self.subject = plan, subject
        self.device = torch_device(plan.device)
        self.pipe = subject.pipe(plan).to(self.device)
        for part in (self.pipe.transformer, self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.eval()
        self.base = self.pipe.transformer
        self.prompts = subject.held_out(plan.count)
        self.alike = [prompt for prompt in self.prompts[: plan.alike] for _ in range(plan.pictures)]
        texts = self.captions(0, 1).train
        self.table = EmbeddedPrompts(
            partial(network.encode_text, self.pipe), [row.text for row in texts] + self.prompts
        )
        self.features = subject.features()

    def captions(self, seed: int, batch: int) -> PromptData:
        """The captions that every method is trained on, whatever the seed, which decides their order and the noise."""
        return PromptData(self.subject.captions(self.plan), seed=0, batch=batch, order=seed)

    def cond(self, prompts: list[str]) -> Cond:
        """Conditioning at the guidance that students are distilled with."""
        text = {name: value.to(self.device) for name, value in self.table(prompts).items()}
        return network.place(
            self.pipe, text, height=self.subject.size, width=self.subject.size, guidance=paper.GUIDANCE
        )

    def noise(self, seeds: Sequence[int]) -> Tensor:
        return network.noise(self.pipe, list(seeds), self.subject.size, self.subject.size).to(self.device)

    def teacher(self, net: nn.Module, cost: Cost) -> Teacher:
        def velocity(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            cost.add(len(x))
            if not is_student(net):
                with torch.no_grad():
                    return network.call(net, x, sigma, cond).float()
            return views.teacher_velocity(net, x, sigma, cond)

        return velocity

    def reference(self) -> TeacherImages:
        """What the teacher draws in many steps; minutes on a CPU, so it is kept."""
        grid = step_grid(TEACHER_STEPS, Distill().shift)
        walk = partial(euler, self.teacher(self.base, Cost()), sigmas=grid)
        latents = self._each(lambda x, cond, generator: walk(x, cond), self.prompts, FIRST_SEED)
        alike = self._each(lambda x, cond, generator: walk(x, cond), self.alike, ALIKE_SEED)
        return TeacherImages(latents, self._diversity(alike))

    def measure(self, end: End, reference: TeacherImages) -> tuple[Measured, UInt8[np.ndarray, "few rows columns 3"]]:
        """What the held-out images that a sampler draws are worth, and the first of them. Latents that are not finite
        count as 0, and are counted."""
        latents = self.ends(end)
        broken = int((~latents.isfinite()).flatten(1).any(1).sum())
        latents = latents.nan_to_num(0.0, 0.0, 0.0)
        images = self.images(latents)
        alike = self._each(end, self.alike, ALIKE_SEED).nan_to_num(0.0, 0.0, 0.0)
        measured = Measured(
            distance=squared_error(latents, reference.latents).tolist(),
            right=self.right(images),
            diversity=float(self._diversity(alike).mean() / reference.diversity.mean()),
            broken=broken,
            to_real=self.subject.to_real(images) if self.subject.to_real else None,
        )
        return measured, images[:SHOWN]

    def ends(self, end: End) -> Tensor:
        """Final latents of all held-out prompts."""
        return self._each(end, self.prompts, FIRST_SEED)

    def right(self, images: UInt8[np.ndarray, "count rows columns 3"]) -> list[bool]:
        """Which images of the held-out prompts show exactly what these say."""
        return self.subject.right(images, self.prompts)

    def distance(self, end: End, reference: TeacherImages) -> float:
        """Mean squared distance to the teacher on the first `CURVE` held-out prompts alone."""
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
        return diversity(self.features(self.images(latents)), self.plan.pictures)

    def images(self, latents: Tensor) -> UInt8[np.ndarray, "count rows columns 3"]:
        """Final latents, decoded."""
        size = self.subject.size
        return np.concatenate(
            [network.decode(self.pipe, part.to(self.device), size, size) for part in latents.split(BATCH)]
        )
