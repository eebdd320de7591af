"""The laboratory: distillation in the plane, where the teacher is a formula and a training takes seconds.

Data are M equal round Gaussians, x0 ~ 1/M sum_j N(m_j, c^2 I), by default eight on a circle. Noised they stay what they
are, x_sigma ~ 1/M sum_j N((1 - sigma) m_j, w I) with w = ((1 - sigma) c)^2 + sigma^2, and so the velocity is known:

    u(x, sigma) = E[eps - x0 | x] = sum_j r_j ((sigma - (1 - sigma) c^2) / w (x - (1 - sigma) m_j) - m_j)

r_j being the share of place j in x, a softmax of -|x - (1 - sigma) m_j|^2 / 2w. Nothing is divided by sigma: it holds
down to sigma 0. Time runs from noise (1) to image (0). A point is an image of one token, two channels and one pixel, x
(B, 1, 2), and head, mixture, objective, optimizer and average are those that train the large models.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from arcflow.config import Distill, Model, Optim, Run
from arcflow.data.prefetch import Prepared
from arcflow.distillation.policy import Student, Teacher
from arcflow.distillation.walk import arcs
from arcflow.families.conditioning import Cond
from arcflow.momentum import Mixture, unpack
from arcflow.path import step_grid
from arcflow.runs.checkpoint import Progress
from arcflow.student.head import MomentumHead
from arcflow.system.seeds import seed_of
from arcflow.training.learner import Learner, arcflow_objective

REFERENCE_STEPS = 128
"""Steps of the exact walk: those of order four leave 1e-6 of it."""


@dataclass(frozen=True)
class Gaussians:
    """Equal round Gaussians of the plane and, called as a teacher, the exact velocity from noise to them."""

    means: Float[Tensor, "places 2"]
    spread: float

    def __call__(self, x: Float[Tensor, "batch 1 2"], sigma: Float[Tensor, " batch"], cond: Cond) -> Tensor:
        means = self.means.to(x)
        keep = 1 - sigma[:, None, None]
        sigma = sigma[:, None, None]
        variance = (keep * self.spread).square() + sigma.square()
        apart = x - keep * means
        share = (-apart.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        pull = (sigma - keep * self.spread**2) / variance
        return (share * (pull * apart - means)).sum(1, keepdim=True)

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "count 1 2"]:
        """Points of the data, float64."""
        places = torch.randint(len(self.means), (count,), generator=generator)
        return (self.means.double()[places] + self.spread * starting_points(count, generator)[:, 0])[:, None]


def circle(places: int = 8, radius: float = 3.0, spread: float = 0.25) -> Gaussians:
    """Gaussians at equal distances on a circle."""
    angle = 2 * math.pi * torch.arange(places, dtype=torch.float64) / places
    return Gaussians(radius * torch.stack([angle.cos(), angle.sin()], -1), spread)


def starting_points(count: int, generator: torch.Generator) -> Float[Tensor, "count 1 2"]:
    """Points to start from, float64."""
    return torch.randn(count, 1, 2, generator=generator, dtype=torch.float64)


class Net(nn.Module):
    """A small network whose last layer is the momentum head: a student of the plane."""

    def __init__(self, modes: int, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        sizes = [3, *[width] * layers]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.trunk = nn.Sequential(*[part for a, b in pairs for part in (nn.Linear(a, b), nn.SiLU())])
        self.head = MomentumHead.from_linear(nn.Linear(width, 2), modes, pixels=1)

    def forward(self, x: Float[Tensor, "batch 1 2"], sigma: Float[Tensor, " batch"], cond: Cond) -> Mixture:
        features = self.trunk(torch.cat([x, sigma[:, None, None].expand(-1, 1, 1)], -1))
        return unpack(self.head(features), self.head.modes, self.head.pixels)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """torch's own generator starts from this seed, and is what it was before at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(*parts))
        yield


def train_student(
    teacher: Teacher,
    *,
    modes: int,
    steps: int,
    iterations: int = 1500,
    batch: int = 512,
    seed: int = 0,
    lr: float = 3e-3,
    watch: Callable[[int, dict[str, float]], None] | None = None,
) -> Net:
    """A student of K modes for `steps` calls, its weights averaged. All but size and rates is as published: the
    teacher's share falls over the first fifth, modes are dropped, windows matched. `watch` is told of every iteration.
    """
    run = Run(
        model=Model(modes=modes),
        distill=Distill(steps=steps, decay=iterations // 5),
        optim=Optim(
            iterations=iterations,
            batch=batch,
            lr=lr,
            lr_log_gamma=lr / 10,
            warmup=min(50, iterations // 10),
            clip_from=iterations,  # never: the log's numbers are of whole gradients
            ema_from=50,
        ),
    )
    with seeded(seed, "student"):
        net = Net(modes)
    parameters = {f"proj_out_{name.removeprefix('head.')}": p for name, p in net.named_parameters() if p.numel()}
    learner = Learner(parameters, run)
    progress = Progress()
    for iteration in range(iterations):
        generator = torch.Generator().manual_seed(seed_of(seed, "draws", iteration))
        sample = Prepared(starting_points(batch, generator).float(), {}, {})
        objective = arcflow_objective(run, iteration, net, teacher)
        losses = learner.gradients(objective, sample, generator)
        learner.update(progress)
        if watch:
            watch(iteration, losses.logs())
    learner.average.swap()
    return net


@torch.no_grad()
def exact(
    teacher: Teacher, x: Float[Tensor, "batch 1 2"], sigmas: Float[Tensor, " points"] | None = None, trace: bool = False
) -> Float[Tensor, "*trace_batch 1 2"]:
    """End of the teacher's path, every point of it with `trace`, by the classical Runge-Kutta rule in float64."""
    grid = step_grid(REFERENCE_STEPS) if sigmas is None else sigmas
    x = x.double()

    def u(x: Tensor, sigma: Tensor) -> Tensor:
        return teacher(x, sigma.expand(len(x)), {})

    points = [x]
    for here, there in zip(grid[:-1].double(), grid[1:].double(), strict=True):
        h = there - here
        first = u(x, here)
        second = u(x + h / 2 * first, here + h / 2)
        third = u(x + h / 2 * second, here + h / 2)
        last = u(x + h * third, there)
        x = x + h / 6 * (first + 2 * second + 2 * third + last)
        points.append(x)
    return torch.stack(points) if trace else x


def mean_distance(ends: Float[Tensor, "batch 1 2"], others: Float[Tensor, "batch 1 2"]) -> float:
    """Mean distance, in the plane, of ends that started from the same noise."""
    return float((ends.double() - others.double()).norm(dim=-1).mean())


def arrivals(student: Student, x: Float[Tensor, "batch 1 2"], steps: int) -> Float[Tensor, "batch 1 2"]:
    """Where the student arrives in `steps` calls."""
    return arcs(student, x.float(), {}, step_grid(steps))
