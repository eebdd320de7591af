"""Students whose answers are known."""

import torch

from arcflow import student


def without_gain(transformer, modes=4):
    """A student whose velocities are all the teacher's and whose momentum factors are 0."""
    student.build(transformer, modes=modes, rank=2).eval()
    head = student.trainable(transformer)
    with torch.no_grad():
        head["proj_out_loggamma.bias"].zero_()
        bias = transformer.proj_out.frozen.bias
        head["proj_out_means.bias"].copy_(torch.zeros(()) if bias is None else bias.repeat(modes))
    return transformer
