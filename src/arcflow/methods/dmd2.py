"""DMD2: the student's images are pulled to where the teacher, more than they themselves, expects them.

The student samples in n calls, each a guess of the whole image, x0 = x - sigma u; between calls the guess is noised
again, with fresh noise, to the next level of the grid. For training the calls before a random one are made without
gradient (backward simulation), so that it sees the states it will see. A second network, the fake one, learns by flow
matching how the student's images are distributed, as the teacher knows it of real ones. At x_sigma = (1 - sigma) x0 +
sigma eps, sigma and eps random, both guess the image, and

    pull = (x0_fake - x0_real) / mean |x0 - x0_real|        loss = 0.5 mean (x0 - stop[x0 - pull])^2,  dloss/dx0 ~ pull

A distribution's score is ((1 - sigma) x0_guess - x) / sigma^2, hence pull is score_fake - score_real up to a positive
factor: on average the gradient of the Kullback-Leibler divergence of the student from the teacher, zero where both
agree. The fake network takes five steps for one of the student.

Differs from the paper: without its discriminator, which needs real images; noise levels are uniform in raw time,
shifted as everywhere here. Sources: arXiv 2405.14867, and 2311.18828 for the gradient.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.config import Distill
from arcflow.distillation.method import Method, Training, Turn
from arcflow.distillation.objective import Part
from arcflow.distillation.policy import Student, Teacher, level
from arcflow.distillation.renoise import clean, guess, sample_renoised, simulate
from arcflow.distillation.walk import sampler_grid
from arcflow.families.conditioning import Cond
from arcflow.path import column, shift_sigma
from arcflow.student.state import trainable
from arcflow.student.views import predict
from arcflow.system.seeds import Draws, normal, uniform

FAKE_UPDATES = 5
"""Steps of the fake network for one of the student."""

FAKE_RATE = 1e-3
"""Learning rate of the fake network's own AdamW."""

FAKE_CLIP = 10.0
"""Largest gradient norm of the fake network."""

TAU = (0.02, 0.98)
"""Range of raw times at which the two guesses are compared."""


@dataclass(frozen=True)
class Fake:
    """What knows the student's images: a velocity, with gradient, and what of it learns."""

    velocity: Teacher
    parameters: Sequence[nn.Parameter]


def second_network(net: nn.Module) -> Fake:
    """A copy of the student that has its frozen base in common with it and starts from the same weights.

    Costs 16 bytes for every trained number (weight, gradient, two moments; in FLUX.1-dev at rank 256 0.65 billion, 10
    GB) and its own activations. Draws no dropout. A network that is shared out over processes cannot be copied so."""
    common = {id(value): value for value in (*net.parameters(), *net.buffers()) if not value.requires_grad}
    fake = copy.deepcopy(net, common).eval()
    parameters = list(trainable(fake).values())

    def velocity(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return predict(fake, x, sigma, cond).velocity(0.0)

    return Fake(velocity, parameters)


def pull(
    x0: Float[Tensor, "batch *rest"], fake: Float[Tensor, "batch *rest"], real: Float[Tensor, "batch *rest"]
) -> Float[Tensor, "batch *rest"]:
    """Gradient of the divergence by the image `x0`, from the two guesses; its size does not depend on the level."""
    size = (x0 - real).abs().flatten(1).mean(1).clamp(min=1e-8)
    return (fake - real) / column(size, x0)


class Dmd2:
    """Five steps of the fake network, each on images of its own, and one of the student before the last of them."""

    def __init__(self, config: Distill, training: Training, fake: Fake) -> None:
        self.config, self.cost, self.fake = config, training.cost, fake
        *self.sigmas, _ = sampler_grid(config.steps, config).tolist()
        self.optimizer = torch.optim.AdamW(fake.parameters, FAKE_RATE, weight_decay=0.0)

    def __call__(self, student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
        draws = turn.generator
        for update in range(1, FAKE_UPDATES + 1):
            last = update == FAKE_UPDATES
            count = 1 + int(uniform((len(x), 1), draws)[0] * len(self.sigmas))  # calls; the same for all samples
            state = simulate(student, x if last else normal(x, draws), cond, self.sigmas[:count], draws)
            with torch.set_grad_enabled(last):
                x0 = clean(student, state, level(self.sigmas[count - 1], x), cond)
            if last:
                yield self._lead(teacher, x0, cond, draws)
            self._follow(x0.detach(), cond, draws)

    def _lead(self, teacher: Teacher, x0: Tensor, cond: Cond, draws: Draws) -> Part:
        """The student's loss on its images `x0`."""
        still = x0.detach()
        sigma = self._levels(still, draws, *TAU)
        x = torch.lerp(still, normal(still, draws), column(sigma, still))
        with torch.no_grad():
            fake, real = (guess(network(x, sigma, cond), x, sigma) for network in (self.fake.velocity, teacher))
        self.cost.add(len(x))
        loss = 0.5 * (x0 - (still - pull(still, fake, real))).square().mean()
        return Part(loss, {"loss": loss.detach(), "distance": (fake - real).square().mean()})

    def _follow(self, x0: Tensor, cond: Cond, draws: Draws) -> None:
        """A step of the fake network on the student's images, by flow matching."""
        sigma, eps = self._levels(x0, draws), normal(x0, draws)
        u = self.fake.velocity(torch.lerp(x0, eps, column(sigma, x0)), sigma, cond)
        self.cost.add(len(x0), backward=True)
        (u - (eps - x0)).square().mean().backward()
        nn.utils.clip_grad_norm_(self.fake.parameters, FAKE_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _levels(self, x: Tensor, draws: Draws, low: float = 0.0, high: float = 1.0) -> Tensor:
        return shift_sigma(low + (high - low) * uniform((len(x),), draws).to(x), self.config.shift)


def objective(config: Distill, training: Training) -> Dmd2:
    """The objective of one training, with a fake network of its own."""
    return Dmd2(config, training, second_network(training.net))


METHOD = Method(
    name="dmd2",
    title="DMD2",
    paper="2405.14867",
    modes=1,
    objective=objective,
    sample=sample_renoised,
    second_network=True,
)
