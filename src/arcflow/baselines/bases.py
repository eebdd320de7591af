"""ArcFlow with other functions of time: four that are orthogonal over the step in place of sixteen exponentials.

Objective and network are ArcFlow's; only what the head's velocities multiply is another (`series`). Our own.
"""

from functools import partial

from torch import Tensor

from arcflow.baselines.arcflow import along, matching
from arcflow.baselines.method import Method
from arcflow.config import Distill
from arcflow.momentum import Mixture
from arcflow.path import sampler_grid, step_end
from arcflow.series import Means, Series, exponential_means, legendre_means


def laid_over(mixture: Mixture, x: Tensor, sigma: Tensor, config: Distill, *, means: Means) -> Series:
    """The head's velocities as a series over the step that starts at `sigma`."""
    end = step_end(sigma, sampler_grid(config.steps, config))
    return Series.of(mixture.v, sigma - end, means)


def _method(name: str, title: str, means: Means) -> Method:
    lay = partial(laid_over, means=means)
    objective = partial(matching, lay=lay, modes_drop=False)
    return Method(name=name, title=title, paper="", modes=4, objective=objective, sample=along(lay))


LEGENDRE = _method("legendre", "Legendre polynomials", legendre_means)
ORTHOGONAL = _method("orthogonal", "ArcFlow, exponentials made orthogonal", exponential_means)
