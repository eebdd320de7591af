"""TwinFlow: one network is sampler and critic of its own images and of real ones, told apart by the sign of time.

The network F(x, t, r) is told a second noise level, r <= t, and at t > 0 gives the mean velocity from t to r, at r = t
the velocity of real images. At -t, with r = t, it gives that of its own images: the twin. With fake = x - F(x, 1,
0) from noise x, y = (1 - t) fake + t eps, and u the teacher's velocity at y, the four quarters of a batch learn

    whole     t = 1, r = 0                         twin      F(y, -t, t) -> eps - fake
    near      r at most 5 % below t                others    F(y, t, r)  -> F - clamp[((t - r) F - (y - end)) / h]
    any       r anywhere below t                   whole too F(x, 1, 0)  -> F - clamp[F(z, -t, t) - F(z, t, t)]
    twin      -t, r = t

What is on the right has no gradient; clamp is to [-1, 1]. `end` is y - h u, h = 0.01, walked on to r by the network in
two steps (RCGM of order 2; where t - r < h it is F - u), so the others stand still at the mean velocity. Last comes the
rectification, at z = (1 - t) x0 + t eps, t and eps new, x0 = x - F(x, 1, 0): the difference of the two velocities is
(x0_real - x0_fake) / t, and the image moves by it, down the divergence of `dmd`. It has half the weight. A sample's
squared error e counts e / sqrt(e + 1e-6); for the others, tan((1 - t + r) pi / 2.5) + 1 times. t is uniform.

This is the released code's training without images, but for: the teacher's velocity is u itself; r is told as guidance
+ t - r, so that at r = t the student starts as the teacher; rectification waits for a share of the budget, since the
twin starts as a network at times it never saw; a sampler goes along F from level to level, no noise added. Sources:
arXiv 2512.05150 and its code.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.config import Distill
from arcflow.distillation.method import Method, Objective, Training, Turn
from arcflow.distillation.objective import Part
from arcflow.distillation.policy import Student, Teacher, level
from arcflow.distillation.renoise import guess
from arcflow.distillation.walk import sampler_grid
from arcflow.families.conditioning import Cond, rows
from arcflow.path import column
from arcflow.system.seeds import normal, uniform

H = 0.01
"""Noise level over which the teacher is followed, before the network's own way."""

ORDER = 2
"""Steps of that way."""

NEAR = 0.05
"""How far the near r may be, in parts of t."""

RECTIFY = 0.5
"""Weight of the rectification."""

WAIT = 0.1
"""Share of the budget after which it begins."""

Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(state, t, r) -> mean velocity from t to r."""


def network_flow(
    student: Student,
    x: Float[Tensor, "batch *rest"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    cond: Cond,
) -> Float[Tensor, "batch *rest"]:
    """F(x, t, r)."""
    if "guidance" not in cond:
        raise ValueError(
            f"twinflow tells the network its second time by the guidance embedding, and the conditioning has only "
            f"{sorted(cond)}: expected a model with embedded guidance (FLUX.1-dev); take another method for this one."
        )
    guidance = cond["guidance"]
    return student(x, t, cond | {"guidance": guidance + (t - r).to(guidance)}).velocity(0.0)


def twin_velocity(
    student: Student, x: Float[Tensor, "batch *rest"], t: Float[Tensor, " batch"], cond: Cond
) -> Float[Tensor, "batch *rest"]:
    """F(x, -t, t): the velocity of the network's own images."""
    return student(x, -t, cond).velocity(0.0)


@torch.no_grad()
def inconsistency(
    f: Float[Tensor, "batch *rest"],
    u: Float[Tensor, "batch *rest"],
    x: Float[Tensor, "batch *rest"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    flow: Flow,
) -> Float[Tensor, "batch *rest"]:
    """What is wrong with the mean velocity `f` from t to r, if the way begins with `u` and goes on by `flow`: their
    difference, times (t - r) / h but at least once."""
    here = torch.maximum(t - H, r)
    end = guess(u, x, t - here)
    for there in (torch.lerp(here, r, i / ORDER) for i in range(1, ORDER + 1)):
        end = guess(flow(end, here, there), end, here - there)
        here = there
    gap = column(t - r, x)
    return torch.where(gap < H, f - u, (gap * f - (x - end)) / H)


def robust(error: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """Squared error of each sample over its own root: large ones do not outweigh the others."""
    squares = error.square().flatten(1).mean(1)
    return squares / (squares.detach() + 1e-6).sqrt()


def moved(f: Float[Tensor, "batch *rest"], by: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """Loss whose descent moves `f` against `by`, at most by 1 in each number."""
    return robust(f - (f - by.clamp(-1.0, 1.0)).detach())


@torch.no_grad()
def sample(student: Student, x: Tensor, cond: Cond, steps: int, config: Distill, generator: torch.Generator) -> Tensor:
    """Latents walked from level to level of the grid by the mean velocity between them."""
    for here, there in pairwise(sampler_grid(steps, config).tolist()):
        t, r = level(here, x), level(there, x)
        x = guess(network_flow(student, x, t, r, cond), x, t - r)
    return x


@torch.no_grad()
def difference(
    student: Student, x: Float[Tensor, "batch *rest"], t: Float[Tensor, " batch"], cond: Cond
) -> Float[Tensor, "batch *rest"]:
    """How the velocity of the network's own images differs from that of real ones, both as it knows them."""
    return twin_velocity(student, x, t, cond) - network_flow(student, x, t, t, cond)


def iteration(student: Student, teacher: Teacher, x: Tensor, cond: Cond, turn: Turn) -> Iterator[Part]:
    """Two losses, one of the twin, one of the other three quarters with the rectification."""
    quarter, draws = len(x) // 4, turn.generator
    if not quarter:
        raise ValueError(f"{len(x)} samples at once: expected 4 or more, one for each part; raise the batch.")
    t, share, level = uniform((len(x), 3), draws).to(x).unbind(-1)
    eps, again = normal(x, draws), normal(x, draws)
    t[:quarter], share[:quarter] = 1.0, 1.0
    share[quarter : 2 * quarter] *= NEAR
    r = t * (1 - share)
    with torch.no_grad():
        start, ones = x[quarter:], torch.ones_like(t[quarter:])
        fake = start - network_flow(student, start, ones, torch.zeros_like(ones), rows(cond, slice(quarter, None)))
    y = torch.cat([x[:quarter], torch.lerp(fake, eps[quarter:], column(t[quarter:], fake))])

    own, others, whole = slice(3 * quarter, None), slice(3 * quarter), slice(quarter)
    error = twin_velocity(student, y[own], t[own], rows(cond, own)) - (eps[own] - fake[2 * quarter :])
    yield _part(robust(error).sum() / len(x), error)
    del error

    seed = int(uniform((len(x), 1), draws)[0] * 2**31)

    def flow(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        # the same dropout in every call, or what it does would count 1 / h times
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            return network_flow(student, x, t, r, rows(cond, others))

    u = teacher(y[others], t[others], rows(cond, others))
    f = flow(y[others], t[others], r[others])
    wrong = inconsistency(f, u, y[others], t[others], r[others], flow)
    weight = torch.tan((1 - t[others] + r[others]) * math.pi / 2.5) + 1
    loss = (weight * moved(f, wrong)).sum() / len(x)
    if turn.done >= WAIT:
        x0, those = x[whole] - f[whole].detach(), rows(cond, whole)
        z = torch.lerp(x0, again[whole], column(level[whole], x0))
        loss = loss + RECTIFY * moved(f[whole], difference(student, z, level[whole], those)).mean()
    yield _part(loss, wrong)


def _part(loss: Tensor, error: Tensor) -> Part:
    return Part(loss, {"loss": loss.detach(), "distance": error.detach().square().mean()})


def objective(config: Distill, training: Training) -> Objective:
    """The objective, which is the same for every training, whatever its number of calls."""
    return iteration


METHOD = Method(
    name="twinflow",
    title="TwinFlow",
    paper="2512.05150",
    modes=1,
    objective=objective,
    sample=sample,
    per_calls=False,
)
