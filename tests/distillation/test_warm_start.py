"""A warm start: the student hears better noise levels than it is told, exactly, as its base with a LoRA."""

import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from arcflow import student
from arcflow.config import ALWAYS, Distill
from arcflow.distillation.policy import level
from arcflow.distillation.warm_start import Piece, lowest, nearest_levels, tell
from arcflow.families import network
from arcflow.families.conditioning import rows
from arcflow.path import column, step_grid
from arcflow.student.state import trainable
from arcflow.student.views import teacher_velocity
from arcflow.training.learner import views
from arcflow.training.loop import train
from tests.support.gaussian import policy
from tests.support.pipelines import torchrun
from tests.support.trainings import config, newest_tensors, quiet, tiny_pipe

LEVELS = [(1.0, 0.9), (0.76, 0.7)]


def rising(x, sigma, cond):
    """A velocity that goes with the noise level alone, so that its mean over a step is that in the middle."""
    return column(sigma, x).expand_as(x)


def test_a_velocity_that_is_linear_in_the_noise_level_is_told_the_middle_of_each_step():
    x, settings = torch.zeros(3, 2, 4, dtype=torch.float64), Distill(states=64, spread="systematic", solver="adams")
    pieces = [Piece(share, x, {}, torch.Generator().manual_seed(0)) for share in (0.25, 0.75)]
    found = nearest_levels(lambda x, sigma, cond: policy(rising(x, sigma, cond)), rising, pieces, settings)
    grid = step_grid(settings.steps, settings.shift, settings.final_step_scale).tolist()
    assert [start for start, _ in found] == pytest.approx(grid[:-1])
    middles = [(start + end) / 2 for start, end in zip(grid, grid[1:], strict=False)]
    assert [heard for _, heard in found] == pytest.approx(middles, abs=0.01)


def test_a_step_sets_right_what_the_one_before_it_missed():
    """A student that is slow by a tenth behind a certain level lags behind, and its second step makes up for that."""
    x, settings = torch.zeros(3, 2, 4, dtype=torch.float64), Distill(states=64, spread="systematic", solver="adams")

    def slow(x, sigma, cond):
        return policy(torch.where(column(sigma, x) > 0.8, 0.9, 1.0) * rising(x, sigma, cond))

    (_, first), (start, second) = nearest_levels(
        slow, rising, [Piece(1.0, x, {}, torch.Generator().manual_seed(0))], settings
    )
    grid = step_grid(settings.steps, settings.shift, settings.final_step_scale).tolist()
    missed = (grid[0] ** 2 - grid[1] ** 2) / 2 - 0.9 * first * (grid[0] - grid[1])
    assert second == pytest.approx(start / 2 + missed / start, abs=0.01)


def test_the_least_of_a_parabola_is_found_between_its_points():
    points = [0.0, 1.0, 2.0, 3.0]
    assert lowest(points, [(p - 1.3) ** 2 for p in points]) == pytest.approx(1.3)
    assert lowest(points, points) == 0.0, "at an end the end"
    assert lowest(points, [1.0] * 4) == 0.0


@pytest.fixture(params=["plain", "a user's LoRA on the time embedding"])
def new(request):
    """A new student in coefficients, and what it is called with."""
    pipe = tiny_pipe()
    if request.param != "plain":
        hears = ["time_text_embed.timestep_embedder.linear_1"]
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=hears, init_lora_weights=False))
    net, cond = pipe.transformer, network.encode_prompts(pipe, ["a red circle"] * 2, height=8, width=8)
    student.build(net, modes=4, rank=4, dropout=0.5, form="coefficients", generator=torch.Generator().manual_seed(0))
    return net.eval(), views(net)[0], network.noise(pipe, [0, 1], 8, 8), cond


@torch.no_grad()
def test_at_the_start_of_its_steps_the_student_hears_other_levels_exactly(new):
    net, walker, x, cond = new
    tell(net, walker, x[:1], rows(cond, slice(1)), LEVELS)
    for start, heard in LEVELS:
        said = walker(x, level(start, x), cond).velocity(0.0)
        torch.testing.assert_close(said, teacher_velocity(net, x, level(heard, x), cond), rtol=1e-5, atol=1e-5)
    between = walker(x, level(0.85, x), cond).velocity(0.0)
    assert between.isfinite().all(), "what it hears elsewhere nobody asks for"


@torch.no_grad()
def test_a_network_that_cannot_is_refused_and_left_alone(new):
    net, walker, x, cond = new
    before = {name: p.clone() for name, p in trainable(net).items()}
    five = [(1 - 0.1 * i, 0.95 - 0.1 * i) for i in range(5)]
    with pytest.raises(ValueError, match=r"no Linear with a LoRA of enough rank.*set distill\.warm_start to False"):
        tell(net, walker, x, cond, five)

    net.time_text_embed.guidance_embedder.register_forward_pre_hook(lambda module, given: given[0] + NOW["level"])
    with pytest.raises(ValueError, match="elsewhere than in time_text_embed.timestep_embedder.linear_1 too"):
        tell(net, also_to_guidance(walker), x, cond, LEVELS)
    assert all(torch.equal(p, before[name]) for name, p in trainable(net).items())


NOW = {"level": 0.0}


def also_to_guidance(walker):
    """The same student, where the embedding of guidance hears the noise level as well."""

    def call(x, sigma, cond):
        NOW["level"] = 5 * float(sigma[0])
        return walker(x, sigma, cond)

    return call


def run_of(folder, **changes):
    kept = {"model__form": "coefficients", "distill__hold": ALWAYS, "distill__handover": "average", "pictures": 0}
    return config(folder, distill__warm_start=True, **kept, **changes)


@pytest.mark.slow
def test_a_run_starts_warm_once_says_so_and_is_taken_up_to_the_same_bits(tmp_path):
    """With dropout in the LoRA, and an averaged student between the segments that has none."""
    said = []
    train(run_of(tmp_path / "whole"), tiny_pipe(), said.append)
    assert [line for line in said if line.startswith("warm start: the student hears the noise level ")]

    again = []
    for _ in range(3):
        train(run_of(tmp_path / "parts", stop_after=1e-9), tiny_pipe(), again.append)
    train(run_of(tmp_path / "parts"), tiny_pipe(), again.append)
    assert sum(line.startswith("warm start") for line in again) == 1
    whole, parts = newest_tensors(tmp_path / "whole"), newest_tensors(tmp_path / "parts")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("shard", [2, 1], ids=["one copy (FSDP)", "a copy each"])
def test_two_processes_start_as_one(tmp_path, shard):
    torchrun(2, __file__, tmp_path / "two", shard)
    train(run_of(tmp_path / "one", **ONE_STEP), tiny_pipe(), quiet)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


ONE_STEP = {"optim__iterations": 1, "model__dropout": 0.0, "optim__lr": 1e-6}


def test_settings_that_cannot_start_warm_are_refused():
    with pytest.raises(ValueError, match=r"distill\.warm_start.*False for several numbers of calls"):
        Distill(warm_start=True, also_steps=(4,))
    with pytest.raises(ValueError, match=r"distill\.warm_start.*False without a LoRA"):
        config("unused", distill__warm_start=True, model__lora=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(run_of(sys.argv[1], shard=int(sys.argv[2]), **ONE_STEP), tiny_pipe(), quiet)
