"""Distribution matching distillation on Gaussian data, where every velocity and the divergence itself are known."""

import pytest
import torch
from torch import nn

from arcflow.config import Distill
from arcflow.distillation import renoise
from arcflow.distillation.method import Turn
from arcflow.methods import dmd2
from arcflow.system import seeds
from tests.support.counted import counted, learnable, learned
from tests.support.gaussian import MEAN, NARROW, narrow_teacher, policy, training, velocity, width
from tests.support.pipelines import draws

SHAPE = (32, 8, 16)


class Affine(nn.Module):
    """A student with two numbers for each of its calls, known by the noise level; it starts as the teacher."""

    def __init__(self, sigmas):
        super().__init__()
        self.sigmas = torch.tensor(sigmas)
        levels = self.sigmas[:, None, None]
        at = [velocity(torch.full_like(levels, x), self.sigmas, spread=NARROW).flatten() for x in (0.0, 1.0)]
        self.offset, self.slope = nn.Parameter(at[0]), nn.Parameter(at[1] - at[0])

    def forward(self, x, sigma, cond):
        call = (self.sigmas - sigma[:, None]).abs().argmin(-1)
        return policy(self.slope[call, None, None] * x + self.offset[call, None, None])


def known(*spreads):
    """A fake network that knows of Gaussians only, one for each call of the student; it tells from a whole sample which
    call made it. All have the data's mean at first."""
    means = nn.Parameter(torch.full((len(spreads),), MEAN))
    log_stds = nn.Parameter(torch.tensor(spreads).log())

    def mixed(x, sigma, cond):
        s, stds = sigma[:, None, None, None], log_stds.exp()
        spread = width(s, stds) ** 2
        likely = -0.5 * ((x.unsqueeze(-1) - (1 - s) * means) ** 2 / spread + spread.log()).sum((1, 2))
        said = torch.stack([velocity(x, sigma, mean, std) for mean, std in zip(means, stds, strict=True)], -1)
        return (said * likely.softmax(-1)[:, None, None]).sum(-1)

    return dmd2.Fake(mixed, [means, log_stds])


def test_no_pull_where_the_two_guesses_agree():
    x0 = torch.randn(SHAPE, generator=draws())
    real = torch.randn(SHAPE, generator=draws(1))
    assert not dmd2.pull(x0, real, real).any()
    assert not dmd2.pull(real, real, real).any(), "not even where the image is what both expect"
    assert dmd2.pull(x0, real + 1e-3, real).all()


def test_the_loss_of_the_student_has_the_pull_as_its_gradient():
    x0 = torch.randn(SHAPE, generator=draws()).requires_grad_(True)
    method = dmd2.Dmd2(Distill(steps=1), training(), known(1.0))
    method._lead(narrow_teacher, x0, {}, draws(5)).loss.backward()

    again = draws(5)
    tau = dmd2.TAU[0] + (dmd2.TAU[1] - dmd2.TAU[0]) * torch.rand(len(x0), generator=again)
    sigma = 3.2 * tau / (1 + 2.2 * tau)
    s = sigma[:, None, None]
    x = (1 - s) * x0.detach() + s * torch.randn(SHAPE, generator=again)
    fake, real = x - s * velocity(x, sigma, MEAN, 1.0), x - s * narrow_teacher(x, sigma, {})
    expected = (fake - real) / (x0.detach() - real).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(x0.grad * x0.numel(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.9])
def test_with_an_exact_fake_network_the_gradient_is_that_of_the_divergence(sigma):
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.2, 0.9))
    level = torch.full((2,), sigma, dtype=torch.float64)
    eps, noise = (torch.randn(2, 500, 500, generator=draws(seed), dtype=torch.float64) for seed in (1, 2))
    x0 = mean + std * eps
    x = ((1 - sigma) * x0 + sigma * noise).detach()
    fake, real = (x - sigma * velocity(x, level, *to) for to in ((mean.detach(), std.detach()), (MEAN, NARROW)))
    x0.backward(dmd2.pull(x0.detach(), fake, real))
    mine = mean.grad, std.grad

    a, b = (value.detach().clone().requires_grad_(True) for value in (mean, std))
    spread, wanted = (width(sigma, c) ** 2 for c in (b, NARROW))
    divergence = 0.5 * ((spread / wanted) - 1 - (spread / wanted).log() + ((1 - sigma) * (a - MEAN)) ** 2 / wanted)
    divergence.backward()
    assert mine[0] < 0 < mine[1], "too low a mean rises, too wide a spread shrinks, by descent"
    assert float(mine[0] / mine[1]) == pytest.approx(float(a.grad / b.grad), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_a_student_learns_the_mean_and_spread_of_the_data(steps, monkeypatch):
    monkeypatch.setattr(dmd2, "FAKE_RATE", 0.03)
    config, generator, iterations = Distill(steps=steps), draws(), 100 * steps
    method = dmd2.Dmd2(config, training(), known(*(NARROW, 0.9 * NARROW)[:steps]))
    pupil = Affine(method.sigmas)
    optimizer = torch.optim.Adam(pupil.parameters(), 0.02)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

    def spread():
        x = torch.randn(500, 8, 16, generator=draws(7))
        end = renoise.sample_renoised(pupil, x, {}, steps, config, draws(8))
        return end.mean().item(), end.std().item()

    assert spread()[1] < 0.85 * NARROW, "the teacher's own few calls are too narrow"
    for i in range(iterations):
        x = torch.randn(SHAPE, generator=generator)
        for part in method(pupil, narrow_teacher, x, {}, Turn(i / iterations, generator)):
            part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    assert spread() == pytest.approx((MEAN, NARROW), abs=0.02)
    means, log_stds = method.fake.parameters
    assert means.tolist() == pytest.approx([MEAN] * steps, abs=0.05)
    assert log_stds.exp().tolist() == pytest.approx([NARROW] * steps, abs=0.05), "and the fake network has followed"


def test_sampling_is_what_training_simulates():
    config, pupil = Distill(steps=3), Affine([1.0, 0.86, 0.6])
    x = torch.randn(SHAPE, generator=draws())
    end = renoise.sample_renoised(pupil, x, {}, 3, config, draws(1))
    again, state = draws(1), x
    for here, there in ((1.0, 6.4 / 7.4), (6.4 / 7.4, 3.2 / 5.2)):
        x0 = state - here * pupil(state, torch.full((len(x),), here), {}).velocity(0.0)
        state = (1 - there) * x0 + there * torch.randn(SHAPE, generator=again)
    torch.testing.assert_close(end, renoise.clean(pupil, state, torch.full((len(x),), 3.2 / 5.2), {}))
    assert not torch.equal(end, renoise.sample_renoised(pupil, x, {}, 3, config, draws(2)))


def test_each_sample_may_bring_its_own_random_numbers():
    x, several = torch.zeros(3, 2, 4), [draws(i) for i in range(3)]
    noise = seeds.normal(x, several)
    assert torch.equal(noise[1], torch.randn(2, 4, generator=draws(1)))


def test_the_second_network_has_the_base_in_common_and_starts_as_the_student(flux):
    tiny = counted(flux)
    fake, sigma = dmd2.second_network(tiny.net), torch.full((4,), 0.7)
    assert [p.shape for p in fake.parameters] == [p.shape for p in tiny.trained.values()]
    assert not {id(p) for p in fake.parameters} & {id(p) for p in tiny.net.parameters()}
    before = fake.velocity(tiny.x, sigma, tiny.cond)
    assert torch.equal(before, tiny.student(tiny.x, sigma, tiny.cond).velocity(0.0))
    with torch.no_grad():
        for p in fake.parameters:
            p.add_(0.1)
    assert torch.equal(before, tiny.student(tiny.x, sigma, tiny.cond).velocity(0.0))
    assert not torch.equal(before, fake.velocity(tiny.x, sigma, tiny.cond))
    with torch.no_grad():
        tiny.net.x_embedder.weight.zero_()
        tiny.net.x_embedder.bias.zero_()
    one, other = (fake.velocity(x, sigma, tiny.cond) for x in (tiny.x, -tiny.x))
    assert torch.equal(one, other), "what happens to the base happens to both"


@pytest.mark.parametrize("steps", [1, 2])
def test_on_flux_the_student_gets_gradients_the_fake_network_its_steps_and_all_is_counted(steps, flux):
    tiny = counted(flux)
    own = training(tiny.net)
    method = dmd2.objective(Distill(steps=steps), own)
    before, start = ([p.detach().clone() for p in ps] for ps in (method.fake.parameters, tiny.trained.values()))
    parts = 0
    for part in method(tiny.student, tiny.teacher, tiny.x, tiny.cond, Turn(0.5, draws(1))):
        assert part.loss.isfinite()
        part.loss.backward()
        parts += 1
    assert parts == 1
    assert learned(tiny) == learnable(tiny)
    assert not [p for p in tiny.net.parameters() if p.grad is not None and not p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(tiny.trained.values(), start, strict=True)), "the trainer steps"
    moved = [not torch.equal(p, q) for p, q in zip(method.fake.parameters, before, strict=True)]
    assert moved == [name in learnable(tiny) or "lora_A" in name for name in tiny.trained]
    assert own.cost.spent == 4 * (5 * 3 + 1), "five steps, and one look"
    fewest = 4 * (4 + 3 + 1)  # a call for each of four steps, one with gradient, the teacher's
    assert tiny.cost.spent == fewest if steps == 1 else fewest <= tiny.cost.spent <= fewest + 4 * 5
