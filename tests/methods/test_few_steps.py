"""Progressive, reflow and consistency on the real networks: one network, whose weights come and go."""

import pytest
import torch

from arcflow import student
from arcflow.config import Distill
from arcflow.distillation.method import Cost, Training, Turn
from arcflow.methods import consistency, progressive, reflow
from arcflow.runs.ema import Ema
from arcflow.student import views
from tests.support.pipelines import perturb

CONFIG = Distill(steps=1)


@pytest.mark.parametrize("module", [progressive, reflow, consistency])
def test_targets_leave_the_network_as_it_is_and_the_gradient_whole(module, net, inputs, monkeypatch):
    """In the student's view, training, with its own weights; every call is counted once, by who makes it."""
    monkeypatch.setattr(progressive, "START", 4)
    student.build(net, modes=1, rank=2, generator=torch.Generator().manual_seed(0))
    parameters = student.trainable(net)
    about = Training(net, Ema(parameters), Cost())
    perturb(net)
    net.train()
    objective, calls = module.METHOD.objective(CONFIG, about), {"student": 0, "target": 0, "teacher": 0}

    def walker(x, sigma, cond):
        calls["student" if torch.is_grad_enabled() else "target"] += 1
        assert net.training == torch.is_grad_enabled() and not views.in_teacher_view(net)
        return student.predict(net, x, sigma, cond)

    def teacher(x, sigma, cond):
        calls["teacher"] += 1
        return views.teacher_velocity(net, x, sigma, cond)

    before = {name: p.detach().clone() for name, p in parameters.items()}
    for done in (0.0, 0.5, 0.9):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        for part in objective(walker, teacher, inputs.x, inputs.cond, Turn(done, generators)):
            part.loss.backward()
            assert part.loss.isfinite()
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    silent = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert not [name for name in silent if "logweights" not in name and "loggamma" not in name]
    expected = {
        "progressive": {"student": 2 + 1 + 1, "target": 2 + 2, "teacher": 4},
        "reflow": {"student": 3, "target": 0, "teacher": 16},
        "consistency": {"student": 3, "target": 3, "teacher": 16 + 3},
    }
    assert calls == expected[module.METHOD.name]
    assert about.cost.spent == 0
