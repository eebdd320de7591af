"""SCFM: straight lines are its fixed point, and its steps are of every length."""

import pytest
import torch

from arcflow.config import Distill
from arcflow.distillation.method import Turn
from arcflow.methods import scfm
from tests.support import gaussian
from tests.support.pipelines import draws

CONFIG = Distill()


def line(x, sigma, cond):
    return gaussian.policy(gaussian.straight(x, sigma, cond))


def losses(student):
    objective = scfm.METHOD.objective(CONFIG, gaussian.training(gaussian.Affine()))
    return [part.loss for part in objective(student, gaussian.straight, gaussian.noise(), {}, Turn(0.0, draws()))]


def test_a_straight_teacher_is_its_own_student():
    (loss,) = losses(line)
    assert loss < 1e-10
    (loss,) = losses(gaussian.Affine())
    assert loss > 1e-2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_first_half_step_is_the_teachers_or_the_fast_averages(share, monkeypatch):
    """A student that says 0 everywhere: its loss is what is left of the teacher's velocity."""
    monkeypatch.setattr(scfm, "BY_TEACHER", share)
    (loss,) = losses(lambda x, sigma, cond: gaussian.policy(0 * x))
    assert bool(loss > 1e-3) == bool(share)


def test_steps_have_all_lengths_and_stay_on_the_way():
    start, middle, end = scfm.steps(20_000, draws())
    assert start.max() <= 1 and end.min() >= -1e-6
    torch.testing.assert_close(middle, (start + end) / 2)
    lengths = (start - end).log2().round().unique()
    assert lengths.tolist() == [-6, -5, -4, -3, -2, -1, 0]
