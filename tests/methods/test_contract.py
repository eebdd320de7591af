"""What holds for every method of a comparison, on a stock transformer: a new one is held to it by its entrant alone."""

import re
from types import SimpleNamespace

import pytest
import torch

from arcflow import student
from arcflow.comparison.entrants import STUDIES, entrants
from arcflow.config import Distill
from arcflow.distillation.method import Cost, Method, Training, Turn
from arcflow.families import network
from arcflow.runs.ema import Ema
from arcflow.student import views
from tests.support.pipelines import SIDE, draws, perturb

METHODS = {entrant.method.name: entrant.method for study in STUDIES for entrant in entrants(study)}
STEPS = 2


@pytest.fixture(params=list(METHODS))
def method(request) -> Method:
    return METHODS[request.param]


class Bench:
    """A student of the method's size on a network, and the calls that are made of it and of its teacher."""

    def __init__(self, method: Method, net) -> None:
        student.build(net, modes=method.modes, rank=2, dropout=0.0, generator=draws())
        perturb(net)
        self.net = net
        self.parameters = student.trainable(net)
        self.training = Training(net, Ema(self.parameters), Cost())
        self.config = Distill(steps=STEPS)
        self.method = method
        self.calls: list[torch.Tensor] = []

    def walker(self, x, sigma, cond):
        self.calls.append(sigma)
        return student.predict(self.net, x, sigma, cond)

    def teacher(self, x, sigma, cond):
        return views.teacher_velocity(self.net, x, sigma, cond)

    def iteration(self, inputs) -> list[float]:
        """Losses of the first iteration; the gradients are left on the weights."""
        self.net.train()
        self.net.zero_grad()
        objective = self.method.objective(self.config, self.training)
        turn = Turn(0.0, [draws(seed) for seed in range(len(inputs.x))])

        losses = []
        for part in objective(self.walker, self.teacher, inputs.x, inputs.cond, turn):
            part.loss.backward()
            losses.append(part.loss.item())
        return losses

    def sample(self, inputs, steps: int, seed: int = 0) -> torch.Tensor:
        self.net.eval()
        self.calls.clear()
        with torch.no_grad():
            return self.method.sample(self.walker, inputs.x, inputs.cond, steps, self.config, draws(seed))


@pytest.fixture
def bench(method, flux) -> Bench:
    return Bench(method, flux.transformer)


@pytest.fixture
def inputs(flux) -> SimpleNamespace:
    """Noise and conditioning for four samples of one family: methods see the two callables alone."""
    prompts = ["a red cube", "a blue ball", "a green ring", "a white cone"]
    cond = network.encode_prompts(flux, prompts, height=SIDE, width=SIDE, max_sequence_length=8)
    return SimpleNamespace(x=network.noise(flux, [0, 1, 2, 3], SIDE, SIDE), cond=cond)


def test_an_iteration_learns_the_student_alone(bench, inputs):
    """Every loss is finite; the head's velocities have a gradient; no weight has moved, and the base asks for none."""
    before = {name: value.detach().clone() for name, value in bench.net.state_dict().items()}
    losses = bench.iteration(inputs)

    assert losses and all(torch.tensor(losses).isfinite())
    after = bench.net.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    learned = {name for name, p in bench.net.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned and learned <= {name for name, p in bench.net.named_parameters() if p.requires_grad}
    assert bench.net.training and not views.in_teacher_view(bench.net)


@pytest.mark.slow
def test_an_iteration_is_the_same_again(bench, inputs):
    """Nothing is random but the generators of the turn."""
    first = bench.iteration(inputs)
    gradients = {name: p.grad.clone() for name, p in bench.parameters.items() if p.grad is not None}

    torch.manual_seed(1)  # another state of the global generator
    assert bench.iteration(inputs) == first
    for name, gradient in gradients.items():
        assert torch.equal(bench.parameters[name].grad, gradient), name


def test_a_sample_costs_a_call_a_step_and_is_the_same_again(bench, inputs):
    """From noise downward, one call of the student for each step; the same noise and generator, the same latents."""
    steps = STEPS if bench.method.per_calls else STEPS + 1
    latents = bench.sample(inputs, steps)

    levels = [float(sigma.max()) for sigma in bench.calls]
    assert len(levels) == steps and levels == sorted(levels, reverse=True) and levels[0] == 1.0
    assert latents.shape == inputs.x.shape and latents.isfinite().all()
    assert torch.equal(bench.sample(inputs, steps), latents)


def test_a_method_is_told_by_name_and_source(method):
    assert re.fullmatch(r"[a-z0-9_]+", method.name) and method.title
    assert re.fullmatch(r"(\d{4}\.\d{5})?", method.paper)
