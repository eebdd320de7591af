"""ArcFlow and its rivals that differ in the path alone: each of them learns."""

from dataclasses import replace

import pytest
import torch

from arcflow.config import PARTS, Distill, Optim
from arcflow.distillation.method import Cost, Method, Training, Turn
from arcflow.distillation.objective import distill, teacher_ratio
from arcflow.distillation.walk import euler
from arcflow.methods import arcflow
from arcflow.methods.piflow import DX, GM
from arcflow.methods.series import LEGENDRE, ORTHOGONAL
from arcflow.momentum import Mixture, unpack
from arcflow.path import step_grid
from arcflow.runs.ema import Ema
from arcflow.student.head import MomentumHead
from arcflow.training.optimizer import adamw
from tests.support.pipelines import draws

METHODS = [arcflow.ARCFLOW, arcflow.LINEAR, GM, DX, LEGENDRE, ORTHOGONAL]
CENTERS = 3 * torch.stack([(torch.arange(8) * torch.pi / 4).cos(), (torch.arange(8) * torch.pi / 4).sin()], -1)

each = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def teacher(x, sigma, cond):
    """Eight Gaussians on a circle."""
    s, spread = sigma[:, None], 0.1
    keep, variance = 1 - s, (spread * (1 - s)).square() + s.square()
    offset = x[:, None] - keep[:, None] * CENTERS
    center = (-offset.square().sum(-1) / (2 * variance)).softmax(-1) @ CENTERS
    x0 = center + spread**2 * keep / variance * (x - keep * center)
    return (x - x0) / s.clamp(min=1e-4)


class Tiny(torch.nn.Module):
    """Two layers and the real head, on the plane."""

    def __init__(self, modes: int, width: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modes = modes
        layers = [torch.nn.Linear(3, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(*layers)
        self.head = MomentumHead.from_linear(torch.nn.Linear(width, 2), modes, pixels=1, generator=draws())

    def forward(self, x, sigma, cond) -> Mixture:
        return unpack(self.head(self.body(torch.cat([x, sigma[:, None]], -1))), self.modes, pixels=1)

    def named(self) -> dict[str, torch.nn.Parameter]:
        return {name.replace("head.", "head_"): parameter for name, parameter in self.named_parameters()}


PUBLISHED = {"hold": 0, "decay": PARTS // 5}
"""The teacher's share falls over the first fifth of the budget."""

LED = {"hold": PARTS, "decay": 0}
"""It leads to the end."""


def training(net) -> Training:
    return Training(net, Ema(net.named()), Cost())


def taught(method: Method, config: Distill, iterations: int, batch: int = 128) -> Tiny:
    """A tiny student after so many iterations, by the package's optimizer."""
    net, generator = Tiny(method.modes), draws()
    objective = method.objective(replace(config, reuse=4), training(net))
    optimizer = adamw(net.named(), Optim(lr=3e-3, lr_log_gamma=3e-4))
    for step in range(iterations):
        turn = Turn(step / iterations, generator)
        for part in objective(net, teacher, torch.randn(batch, 2, generator=generator), {}, turn):
            part.loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 50.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - step / iterations)
        optimizer.step()
        optimizer.zero_grad()
    return net


def distances(method: Method, net: Tiny, config: Distill) -> tuple[float, float]:
    """Mean distance to the teacher's end of the student and of as many plain Euler steps."""
    x = torch.randn(1000, 2, generator=draws(5))
    end = euler(teacher, x, {}, step_grid(200))
    walked = method.sample(net, x, {}, config.steps, config, draws())
    chords = euler(teacher, x, {}, step_grid(config.steps))
    student, plain = (float((y - end).norm(dim=-1).mean()) for y in (walked, chords))
    return student, plain


STORIES = [
    # GM's sub-steps take half a minute over the whole path at once.
    pytest.param(method, steps, marks=pytest.mark.long if method is GM and steps == 1 else pytest.mark.slow)
    for method in METHODS
    for steps in (1, 2)
]


@pytest.mark.parametrize(("method", "steps"), STORIES, ids=lambda value: getattr(value, "name", value))
def test_a_few_step_student_learns_to_beat_as_many_euler_steps(method, steps):
    config = Distill(steps=steps, **LED)
    net = taught(method, config, 80 if method is GM else 200)  # GM's sub-steps are slow
    student, plain = distances(method, net, config)
    assert student < 0.6 * plain, (student, plain)


def iterations(method, config, *done, student=None):
    """One after the other, part by part: losses, and the states at which the teacher is asked."""
    net, asked = Tiny(method.modes), []

    def asking(x, sigma, cond):
        asked.append((x, sigma))
        return teacher(x, sigma, cond)

    objective, x = method.objective(config, training(net)), torch.randn(16, 2, generator=draws(1))
    for share in done:
        parts = list(objective(student or net, asking, x, {}, Turn(share, draws(2))))
        yield [part.loss.item() for part in parts], asked.copy()
        asked.clear()


def one_iteration(method, config, done, **more):
    return next(iterations(method, config, done, **more))


@each
def test_the_teachers_part_of_the_walk_falls_to_nothing_within_the_first_fifth(method):
    for done, calls in ((0.0, 8), (0.1, 8), (0.2, 4), (1.0, 4)):  # one by one, or half of the four states at once
        losses, asked = one_iteration(method, Distill(**PUBLISHED), done)
        assert len(losses) == 2 and len(asked) == calls
        assert torch.tensor(losses).isfinite().all()


@each
def test_kept_walks_give_the_losses_they_gave_before_without_asking_the_teacher(method):
    whole = Distill(mode_dropout=0.0, reuse=4, **LED)
    first, *kept, again = iterations(method, whole, *[0.5] * 5)
    assert len(first[1]) == len(again[1]) == 8 and not any(asked for _, asked in kept)
    for losses, _ in kept:
        # the only batch there is, in one part; sub-steps are counted for it as a whole
        assert losses == [pytest.approx(sum(first[0]), rel=1e-3)]


def test_the_lead_holds_then_falls_in_parts_of_the_budget():
    def led(done, hold, decay):
        return teacher_ratio(Turn(done, draws()).part, decay, hold)

    assert [led(done, 500, 250) for done in (0.0, 0.49, 0.5, 0.625, 0.75, 1.0)] == [1, 1, 1, 0.5, 0, 0]
    assert led(0.999, PARTS, 0) == 1 and led(0.1, 0, 0) == 0


def test_arcflow_is_its_objective():
    net, x = Tiny(16), torch.randn(16, 2, generator=draws(1))
    wanted = distill(net, teacher, x, {}, config=Distill(), ratio=0.5, generator=draws(2))
    assert one_iteration(arcflow.ARCFLOW, Distill(**PUBLISHED), 0.1)[0] == [part.loss.item() for part in wanted]


def test_linear_distillation_is_a_constant_velocity_pulled_to_the_teachers():
    net, x = Tiny(1), torch.randn(16, 2, generator=draws(1))
    losses, asked = one_iteration(arcflow.LINEAR, Distill(steps=1, **PUBLISHED), 1.0)
    u = net(x, torch.ones(16), {}).v.squeeze(-2)
    states, sigma = (torch.cat(part) for part in zip(*asked, strict=True))
    torch.testing.assert_close(states, x.repeat(4, 1) - (1 - sigma)[:, None] * u.repeat(4, 1))
    wanted = 15 * (u.repeat(4, 1) - teacher(states, sigma, {})).square().mean()
    assert losses == [pytest.approx(wanted.item(), rel=1e-5)]


@each
def test_the_copy_that_walks_loses_modes_only_where_there_are_modes(method):
    asked = [
        one_iteration(method, Distill(mode_dropout=p, **PUBLISHED), 1.0)[1][0][0] for p in (1e-9, 0.5)
    ]  # the same draws
    assert torch.equal(*asked) == (method.name not in ("arcflow", "piflow_gm"))


@each
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_sample_takes_as_many_calls_as_steps_each_to_its_own_end(method, steps):
    net, seen = Tiny(method.modes), []

    def student(x, sigma, cond):
        seen.append(float(sigma[0]))
        return net(x, sigma, cond)

    x = torch.randn(5, 2, generator=draws())
    end = method.sample(student, x, {}, steps, Distill(also_steps=(1, 3)), draws())
    assert seen == step_grid(steps)[:-1].tolist()
    assert end.isfinite().all() and not end.requires_grad


@each
def test_what_a_path_does_not_use_stays_as_it_is_and_everything_else_learns(method):
    net = Tiny(method.modes)
    before = {name: parameter.detach().clone() for name, parameter in net.named().items()}
    optimizer = adamw(net.named(), Optim(lr=3e-3, lr_log_gamma=3e-4))
    (part,) = method.objective(Distill(steps=1), training(net))(
        net, teacher, torch.randn(16, 2, generator=draws(1)), {}, Turn(0.5, draws(2))
    )
    part.loss.backward()
    assert torch.nn.utils.clip_grad_norm_(net.parameters(), 50.0).isfinite()
    optimizer.step()
    still = {name for name, parameter in net.named().items() if torch.equal(parameter, before[name])}
    gates = {f"head_{part}.{kind}" for part in ("logweights", "loggamma") for kind in ("weight", "bias")}
    assert still == (set() if method.modes in (16, 8) else gates)
