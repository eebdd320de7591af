"""The teacher itself in few calls: nothing is trained, only its path is followed by a better rule.

Sampling is the equation dx/dsigma = u(x, sigma), walked from sigma 1 (noise) to 0 (image). With the image that the
teacher has in mind, D = x - sigma u, the three rules take a step from s to t

    Euler           x_t = x - (s - t) u
    Heun            x_t = x - (s - t) (u + u') / 2,  u' the velocity where Euler arrives                      two calls
    DPM-Solver++    x_t = t / s x + (1 - t / s) (D + h / 2h' (D - D'))                                        one call

D' is that of the step before; h' and h are what the two steps gain in lambda = log((1 - sigma) / sigma). It goes from
-inf (noise) to inf (image): after the infinite first step the bend h / 2h' is 0, and the infinite last one goes
straight for D, as usual. So up to three calls this rule is Euler, and its order is two but for a logarithm. Sources:
arXiv 2206.00364, algorithm 1 (Heun); 2211.01095, algorithm 2, with alpha = 1 - sigma.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from arcflow.distillation.policy import Teacher
from arcflow.distillation.walk import euler
from arcflow.families.conditioning import Cond
from arcflow.path import SHIFT, step_grid

Solver = Callable[[Teacher, Tensor, Cond, int, float], Tensor]
"""(teacher, noise, conditioning, calls, shift) -> final latents, with exactly this number of calls of the teacher."""


def by_euler(
    teacher: Teacher, x: Float[Tensor, "batch *rest"], cond: Cond, calls: int, shift: float = SHIFT
) -> Float[Tensor, "batch *rest"]:
    """One call a step."""
    return euler(teacher, x, cond, step_grid(calls, shift))


@torch.no_grad()
def by_heun(
    teacher: Teacher, x: Float[Tensor, "batch *rest"], cond: Cond, calls: int, shift: float = SHIFT
) -> Float[Tensor, "batch *rest"]:
    """Two calls a step. If their number is odd, the last step is Euler's, as usual; if even, the teacher is asked at
    the image too."""
    sigmas = step_grid((calls + 1) // 2, shift).to(x)
    levels = sigmas[:, None].expand(-1, len(x))
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        u = teacher(x, levels[i], cond)
        if 2 * i + 1 < calls:
            u = (u + teacher(x - (s - t) * u, levels[i + 1], cond)) / 2
        x = x - (s - t) * u
    return x


@torch.no_grad()
def by_dpmpp(
    teacher: Teacher, x: Float[Tensor, "batch *rest"], cond: Cond, calls: int, shift: float = SHIFT
) -> Float[Tensor, "batch *rest"]:
    """DPM-Solver++ (2M): one call a step, bent by the one before."""
    sigmas = step_grid(calls, shift)
    ratio, bend = (sigmas[1:] / sigmas[:-1]).tolist(), bends(sigmas).tolist()
    before = torch.zeros_like(x)
    for i, sigma in enumerate(sigmas[:-1].to(x)):
        clean = x - sigma * teacher(x, sigma.expand(len(x)), cond)
        x = ratio[i] * x + (1 - ratio[i]) * (clean + bend[i] * (clean - before))
        before = clean
    return x


def bends(sigmas: Float[Tensor, " points"]) -> Float[Tensor, " steps"]:
    """h / 2h' of each step; 0 where there is no step before, or one of the two is infinite."""
    sigmas = sigmas.double()
    gained = ((1 - sigmas) / sigmas).log().diff()
    bend = torch.zeros_like(gained)
    bend[1:-1] = gained[1:-1] / gained[:-2] / 2
    return bend


SOLVERS: dict[str, Solver] = {"euler": by_euler, "heun": by_heun, "dpmpp": by_dpmpp}
