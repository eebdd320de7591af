"""TwinFlow on Gaussian data, where mean velocities between any two levels are known in closed form."""

import math

import pytest
import torch
from torch import nn

from arcflow.config import Distill
from arcflow.distillation.method import Turn
from arcflow.methods import twinflow
from arcflow.path import unshift_sigma
from tests.support.counted import counted, learnable, learned
from tests.support.gaussian import MEAN, NARROW, narrow_teacher, policy, training, velocity, width
from tests.support.pipelines import draws

GUIDANCE = 3.5
BATCH, SHAPE = 64, (64, 2, 4)


def cond(count=BATCH):
    return {"guidance": torch.full((count,), GUIDANCE)}


def noise(seed=0, count=BATCH):
    return torch.randn(count, *SHAPE[1:], generator=draws(seed))


def mean_velocity(x, t, r, std=NARROW):
    """From t to r along the ODE of Gaussian data; at r = t the velocity."""
    t, r = t[:, None, None], r[:, None, None]
    end = (1 - r) * MEAN + width(r, std) / width(t, std) * (x - (1 - t) * MEAN)
    return torch.where(t - r < 1e-4, velocity(x, t.flatten(), spread=std), (x - end) / (t - r).clamp(min=1e-4))


def exact(own=NARROW, real=NARROW):
    """A student that has learned all there is: `own` is the spread its twin tells of, `real` that of the data."""

    def network(x, sigma, cond):
        r = sigma - (cond["guidance"] - GUIDANCE)
        u = mean_velocity(x, sigma.abs(), r.abs(), real)
        return policy(torch.where(sigma[:, None, None] < 0, velocity(x, sigma.abs(), MEAN, own), u))

    return network


class Knowing(nn.Module):
    """Starts as the teacher and knows where to go, not how far: `bend` 1 is the mean velocity. Its twin knows of
    Gaussians only."""

    def __init__(self):
        super().__init__()
        self.bend, self.mean, self.log_std = (nn.Parameter(torch.tensor(v)) for v in (0.0, MEAN, math.log(NARROW)))

    def forward(self, x, sigma, cond):
        t, u = sigma.abs(), narrow_teacher(x, sigma.abs(), {})
        real = u + self.bend * (mean_velocity(x, t, t - (cond["guidance"] - GUIDANCE)) - u)
        twin = velocity(x, t, self.mean, self.log_std.exp())
        return policy(torch.where(sigma[:, None, None] < 0, twin, real))


class Small(nn.Module):
    """The teacher and a correction, linear in the state, that a small network has to find."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        self.net = nn.Sequential(*layers)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, sigma, cond):
        t, gap = sigma.abs(), cond["guidance"] - GUIDANCE
        r = (t - gap).clamp(min=0)
        tau, tau_r = unshift_sigma(t, 3.2), unshift_sigma(r, 3.2)
        told = torch.stack([t, r, tau, tau_r, t * t, r * r, t * r, tau * tau_r, (sigma < 0).float()], -1)
        slope, offset = (self.net(told) * torch.where(sigma < 0, 1.0, gap)[:, None])[:, :, None, None].unbind(1)
        return policy(narrow_teacher(x, t, {}) + slope * x + offset)


def trained(pupil, iterations, lr):
    """The pupil after a training."""
    optimizer, generator = torch.optim.Adam(pupil.parameters(), lr), draws(1)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        x = torch.randn(SHAPE, generator=generator)
        for part in twinflow.iteration(pupil, narrow_teacher, x, cond(), Turn(i / iterations, generator)):
            part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return pupil


def ends(pupil, steps):
    """Mean and spread of what it samples."""
    end = twinflow.sample(pupil, noise(7, 1000), cond(1000), steps, Distill(), draws())
    return end.mean().item(), end.std().item()


def test_where_images_are_distributed_as_the_data_nothing_is_rectified():
    t = torch.rand(BATCH, generator=draws(1)) * 0.98 + 0.01
    assert not twinflow.difference(exact(), noise(), t, cond()).any()
    assert twinflow.difference(exact(own=0.3), noise(), t, cond()).any()


@pytest.mark.parametrize("own", [0.2, 0.8])
def test_rectification_is_the_difference_of_the_scores_and_moves_images_down_the_divergence(own):
    x0, t = MEAN + own * noise(), torch.rand(BATCH, generator=draws(1)) * 0.9 + 0.05
    s = t[:, None, None]
    x = (1 - s) * x0 + s * noise(2)
    scores = [-(x - (1 - s) * MEAN) / width(s, std) ** 2 for std in (own, NARROW)]
    by = twinflow.difference(exact(own), x, t, cond())
    torch.testing.assert_close(by, (scores[1] - scores[0]) * s / (1 - s), rtol=1e-3, atol=1e-3)

    f = (noise() - x0).requires_grad_(True)
    twinflow.moved(f, by).sum().backward()
    assert torch.equal(f.grad.sign(), by.sign())
    after = (noise() - (f - f.grad)).std() - x0.std()
    assert (after > 0) == (own < NARROW), "too narrow a spread widens, too wide a one shrinks"


def test_the_mean_velocity_is_consistent_and_nothing_else_is():
    t = torch.rand(BATCH, generator=draws(1)) * 0.9 + 0.05
    r = t * torch.rand(BATCH, generator=draws(2))
    x = (1 - t)[:, None, None] * MEAN + width(t, NARROW)[:, None, None] * noise()

    def flow(x, t, r):
        return twinflow.network_flow(exact(), x, t, r, cond())

    def wrong(f):
        return twinflow.inconsistency(f, narrow_teacher(x, t, {}), x, t, r, flow).square().mean().sqrt()

    assert wrong(mean_velocity(x, t, r)) < 0.03, "of the order of the step, h"
    assert wrong(narrow_teacher(x, t, {})) > 1


def test_a_short_way_is_the_teachers():
    t = torch.rand(BATCH, generator=draws(1)) * 0.9 + 0.05
    x, u, f = noise(), noise(2), noise(3)
    wrong = twinflow.inconsistency(f, u, x, t, t - twinflow.H / 2, lambda x, t, r: torch.full_like(x, torch.inf))
    assert torch.equal(wrong, f - u), "whatever the network says"


def test_large_errors_count_by_their_size_and_small_ones_by_their_square():
    error = torch.tensor([1e2, 1.0, 1e-5])[:, None, None].expand(3, *SHAPE[1:])
    torch.testing.assert_close(twinflow.robust(error), torch.tensor([1e2, 1.0, 1e-7]), rtol=1e-4, atol=0)


def test_without_a_second_time_the_method_refuses():
    with pytest.raises(ValueError, match="guidance"):
        twinflow.sample(exact(), noise(), {}, 1, Distill(), draws())
    with pytest.raises(ValueError, match="4 or more"):
        list(twinflow.iteration(exact(), narrow_teacher, noise(count=3), cond(3), Turn(0.5, draws())))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_student_that_knows_its_mean_velocities_samples_exactly(steps):
    end = twinflow.sample(exact(), noise(), cond(), steps, Distill(), draws())
    torch.testing.assert_close(end, MEAN + NARROW * noise(), atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_student_that_has_learned_all_is_at_its_floor():
    """What is left of the twin is the scatter of single images; of the others the length of the step."""
    twin, others = twinflow.iteration(exact(), narrow_teacher, noise(), cond(), Turn(0.5, draws()))
    assert others.logs["distance"].sqrt() < 0.05
    narrow, _ = twinflow.iteration(exact(own=0.05), narrow_teacher, noise(), cond(), Turn(0.5, draws()))
    assert twin.loss < narrow.loss


@pytest.mark.slow
def test_a_student_learns_the_mean_and_spread_of_the_data_in_any_number_of_calls():
    assert ends(Knowing(), 1)[1] < 0.05 * NARROW, "one call of the teacher gives the mean of all images"
    pupil = trained(Knowing(), 120, 0.03)
    assert pupil.bend.item() == pytest.approx(1.0, abs=0.05)
    assert [pupil.mean.item(), pupil.log_std.exp().item()] == pytest.approx([MEAN, NARROW], abs=0.03), (
        "so does its twin"
    )
    assert all(ends(pupil, steps) == pytest.approx((MEAN, NARROW), abs=0.03) for steps in (1, 2, 3))


@pytest.mark.long
def test_a_student_that_knows_nothing_learns_it_too():
    pupil = trained(Small(), 2000, 0.005)
    assert all(ends(pupil, steps) == pytest.approx((MEAN, NARROW), abs=0.04) for steps in (1, 2))
    for level in (0.2, 0.6, 0.9):
        t = torch.full((BATCH,), level)
        x = (1 - level) * (MEAN + NARROW * noise()) + level * noise(1)
        assert twinflow.difference(pupil, x, t, cond()).square().mean().sqrt() < 0.1, "the twin has followed"


def test_on_flux_the_gradients_reach_what_is_trained_and_all_is_counted(flux):
    tiny = counted(flux)
    own = training(tiny.net)
    for done, rectified in ((0.0, 0), (0.5, 2)):
        tiny.net.zero_grad()
        tiny.cost.spent = 0
        seen = []
        for part in twinflow.objective(Distill(), own)(
            tiny.student, tiny.teacher, tiny.x, tiny.cond, Turn(done, draws(1))
        ):
            assert part.loss.isfinite()
            part.loss.backward()
            seen.append(learned(tiny))
            tiny.net.zero_grad()
        assert seen == [learnable(tiny)] * 2, "the twin's loss and the others' reach all of them"
        assert not [p for p in tiny.net.parameters() if p.grad is not None and not p.requires_grad]
        # images for three, the twin with gradient; the other three: teacher, two steps of the way, gradient
        assert tiny.cost.spent == 3 + 3 + 3 * (1 + 2 + 3) + rectified
        assert own.cost.spent == 0


def test_dropout_does_not_count_as_inconsistency(flux):
    """What is dropped is the same at the start of a way and along it."""
    tiny, seeds = counted(flux), []

    def pupil(x, sigma, cond):
        seeds.append(torch.initial_seed())
        return tiny.student(x, sigma, cond)

    own = torch.initial_seed()
    list(twinflow.iteration(pupil, tiny.teacher, tiny.x, tiny.cond, Turn(0.0, draws(1))))
    images, twin, *others = seeds
    assert images == twin == own == torch.initial_seed()
    assert len(others) == 3
    assert len({own, *others}) == 2
