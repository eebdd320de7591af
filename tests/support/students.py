"""Students whose answers are known."""

import torch

from arcflow import student
from arcflow.student.state import state_of


def without_gain(transformer, modes=4, integrates=False):
    """A student whose velocities are all the teacher's and whose momentum factors are 0; with `integrates` it gives
    mean velocities, as an attached one does."""
    student.build(transformer, modes=modes, rank=2).eval()
    head = student.trainable(transformer)
    with torch.no_grad():
        head["proj_out_loggamma.bias"].zero_()
        bias = transformer.proj_out.frozen.bias
        head["proj_out_means.bias"].copy_(torch.zeros(()) if bias is None else bias.repeat(modes))
    state_of(transformer).head.integrates = integrates
    return transformer
