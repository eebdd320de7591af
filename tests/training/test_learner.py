"""The one place where a student takes a step: what it adds up, what it takes, what it leaves out."""

import math
import re
from pathlib import Path

import pytest
import torch

import arcflow
from arcflow.config import Model, Optim, Run
from arcflow.data.prefetch import Prepared
from arcflow.distillation.objective import Part
from arcflow.runs.checkpoint import Progress
from arcflow.system.processes import Ranks
from arcflow.training.learner import Learner, sample_draws
from tests.support.trainings import config, tiny_pipe

SOURCE = Path(arcflow.__file__).parent

OTHERS = {
    "training/pretrain.py",  # the small teacher: no student
    "methods/dmd2.py",  # the second network of DMD2
    "laboratory/ideal.py",  # the best coefficients of single paths, without a network
}
"""Files that step an optimizer of something else."""


def learner(**optim):
    """Two numbers that learn to be the mean of their samples."""
    settings = {"batch": 4, "warmup": 0, "clip_from": 0, "ema_from": 100, "lr": 0.1, "lr_log_gamma": 0.1}
    parameters = {"proj_out_means.weight": torch.nn.Parameter(torch.zeros(2))}
    return Learner(parameters, Run(model=Model(modes=2), optim=Optim(**settings | optim)))


def pulled(here):
    """Two losses: the first number to its column, the second to its own."""

    def objective(sample, draws):
        for i in range(2):
            error = (here.parameters["proj_out_means.weight"][i] - sample.x[:, i]).square().mean()
            yield Part(error, {"loss": error.detach(), "distance": error.detach() / 2})

    return objective


SAMPLE = Prepared(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 9.0]]), {}, {})


def files_with(pattern):
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if re.search(pattern, path.read_text())}
    return {name.replace("\\", "/") for name in found}


def test_one_loop_steps_an_optimizer_on_a_student():
    assert files_with(r"optimizer\.step\(") - OTHERS == {"training/learner.py"}


def test_only_commands_decide_how_a_process_ends():
    assert {name for name in files_with(r"raise SystemExit") if not name.startswith("commands/")} == {"cli.py"}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(size):
    whole, parts = learner(), learner(micro_batch=size)
    wanted = whole.gradients(pulled(whole), SAMPLE, sample_draws(range(4))).logs()
    found = parts.gradients(pulled(parts), SAMPLE, sample_draws(range(4))).logs()
    assert found == pytest.approx(wanted)
    assert [*found] == ["loss", "loss_1", "loss_2", "velocity_error"]
    assert found["loss"] == pytest.approx(found["loss_1"] + found["loss_2"])
    one, other = (here.parameters["proj_out_means.weight"].grad for here in (whole, parts))
    torch.testing.assert_close(one, other)


def test_samples_keep_their_own_random_numbers_in_micro_batches():
    here, seen = learner(micro_batch=3), []

    def objective(sample, draws):
        seen.extend(float(torch.rand(1, generator=one)) for one in draws)
        return pulled(here)(sample, draws)

    here.gradients(objective, SAMPLE, sample_draws(range(4)))
    assert seen == [float(torch.rand(1, generator=one)) for one in sample_draws(range(4))]


def test_a_step_moves_weights_and_average_and_counts():
    here, progress = learner(), Progress()
    here.gradients(pulled(here), SAMPLE, torch.Generator())
    norm = here.update(progress)
    weights = here.parameters["proj_out_means.weight"]
    assert norm == pytest.approx(math.hypot(8, 10.5)) and weights.grad is None
    assert torch.equal(here.average.weights["proj_out_means.weight"], weights.detach())  # a plain copy at first
    assert weights.tolist() == pytest.approx([0.1, 0.1]) and (progress.step, progress.samples) == (1, 4)


def test_the_rate_is_that_of_the_iteration_or_of_the_part_of_a_budget():
    schedule = {"iterations": 1000, "cooldown": "linear", "cooldown_iterations": 1000}
    for at, rate in ((None, 0.1), (0, 0.1), (750, 0.025)):
        here = learner(**schedule)
        here.gradients(pulled(here), SAMPLE, torch.Generator())
        here.update(Progress(), at=at)
        assert here.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_step_that_is_not_finite_leaves_everything_and_is_counted():
    here, progress = learner(most_skipped=2), Progress()
    broken = Prepared(SAMPLE.x * math.nan, {}, {})
    here.gradients(pulled(here), broken, torch.Generator())
    assert math.isnan(here.update(progress))
    assert here.parameters["proj_out_means.weight"].tolist() == [0, 0] and not here.optimizer.state
    assert (progress.step, progress.skipped, progress.in_a_row) == (1, 1, 1)
    here.gradients(pulled(here), broken, torch.Generator())
    with pytest.raises(ValueError, match="2 iterations in a row were skipped, the last with loss nan, loss_1 nan"):
        here.update(progress)


def test_frozen_parts_of_the_head_are_not_among_what_is_trained(tmp_path):
    net = tiny_pipe().transformer
    here = Learner.on(net, config(tmp_path), frozen=("logweights", "loggamma"))
    assert any("_means." in name for name in here.parameters)
    assert not any("logweights" in name or "loggamma" in name for name in here.parameters)
    trained = {id(p) for p in here.parameters.values()}
    assert {id(p) for p in net.parameters() if p.requires_grad} == trained


def test_a_process_alone_agrees_with_itself():
    assert Ranks().any(True, False) == (True, False)
