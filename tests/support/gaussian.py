"""Images whose numbers are all drawn from one Gaussian, N(MEAN, SPREAD^2): teacher and best students are formulas."""

import torch
from torch import nn

from arcflow.config import Distill
from arcflow.distillation.method import Cost, Method, Training, Turn
from arcflow.momentum import Mixture
from arcflow.path import column, shift_sigma, step_grid
from arcflow.runs.ema import Ema

MEAN, SPREAD, NARROW = 0.7, 1.5, 0.4
KNOTS = 16


def noise(count=256, seed=0):
    return torch.randn(count, 1, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def width(sigma, spread=SPREAD):
    """k: on its way a noise eps is at (1 - sigma) MEAN + k eps."""
    return ((1 - sigma) ** 2 * spread**2 + sigma**2) ** 0.5


def velocity(x, sigma, mean=MEAN, spread=SPREAD):
    """The exact one, in a form without a division by sigma: -mean + k'/k (x - (1 - sigma) mean)."""
    sigma = column(sigma, x)
    return -mean + (sigma - (1 - sigma) * spread**2) / width(sigma, spread) ** 2 * (x - (1 - sigma) * mean)


def teacher(x, sigma, cond):
    return velocity(x, sigma)


def narrow_teacher(x, sigma, cond):
    return velocity(x, sigma, spread=NARROW)


def end(eps):
    """Where the teacher's exact path takes noise."""
    return MEAN + SPREAD * eps


def straight(x, sigma, cond):
    """Velocity of the straight lines from every noise to its end: k is linear here."""
    sigma = column(sigma, x)
    eps = (x - (1 - sigma) * MEAN) / ((1 - sigma) * SPREAD + sigma)
    return eps - end(eps)


def policy(u):
    """One velocity as what a student's call returns."""
    return Mixture(u.unsqueeze(-2), u.new_zeros(*u.shape[:-1], 1, 4), u.new_zeros(*u.shape[:-1], 0, 4))


class Affine(nn.Module):
    """A student whose velocity is a x + b: both are a table over raw time with lines between its knots. It starts as
    the teacher at the knots."""

    def __init__(self, shift=3.2):
        super().__init__()
        self.shift = shift
        sigma = shift_sigma(torch.linspace(0, 1, KNOTS + 1, dtype=torch.float64), shift)
        ends = [teacher(torch.full((KNOTS + 1, 1, 1), x, dtype=torch.float64), sigma, {}).flatten() for x in (0.0, 1.0)]
        self.table = nn.Parameter(torch.stack([ends[1] - ends[0], ends[0]]))

    def forward(self, x, sigma, cond):
        place = KNOTS * sigma / (self.shift - (self.shift - 1) * sigma)
        left = place.floor().long().clamp(0, KNOTS - 1)
        a, b = torch.lerp(self.table[:, left], self.table[:, left + 1], place - left)
        return policy(column(a, x) * x + column(b, x))


def training(net=None):
    return Training(net or nn.Identity(), Ema(dict(net.named_parameters()) if net else {}), Cost())


def learn(method: Method, config: Distill, *, teacher=teacher, iterations=150, batch=64, lr=0.1, net=None):
    """A student of this method, trained by the rules of its interface."""
    net = net or Affine(config.shift)
    about = training(net)
    objective = method.objective(config, about)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for i in range(iterations):
        turn = Turn(i / iterations, torch.Generator().manual_seed(i))
        for part in objective(net, teacher, noise(batch, seed=i), {}, turn):
            part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        about.average.update(0.9)
        optimizer.param_groups[0]["lr"] = lr * (1 - turn.done)
    about.average.swap()
    return net


def levels(steps, config):
    return step_grid(steps, config.shift, config.final_step_scale)
