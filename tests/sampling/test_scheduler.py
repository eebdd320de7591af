"""Stock pipelines walk the student's path."""

import copy

import numpy as np
import pytest
import torch

from arcflow import ArcFlowScheduler
from arcflow.momentum import pack
from arcflow.path import step_grid
from tests.support.mixtures import mixture
from tests.support.pipelines import sample
from tests.support.students import without_gain


@pytest.mark.parametrize("integrates", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_without_gain_the_stock_pipeline_samples_plain_euler_bit_for_bit(pipe, steps, integrates):
    pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=3.2)
    euler = sample(pipe, num_inference_steps=steps)
    without_gain(pipe.transformer, integrates=integrates)
    pipe.scheduler = ArcFlowScheduler(num_modes=4)
    assert torch.equal(sample(pipe, num_inference_steps=steps), euler)


def test_a_bfloat16_pipeline_runs_in_its_own_dtype(pipe):
    pipe = copy.deepcopy(pipe).to(torch.bfloat16)
    without_gain(pipe.transformer, integrates=True)
    pipe.scheduler = ArcFlowScheduler(num_modes=4)
    out = sample(pipe)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_a_step_is_the_displacement_of_the_mixture():
    m, x = mixture(2, 5, dtype=torch.float32), torch.randn(2, 5, 8)
    scheduler = ArcFlowScheduler(num_modes=4)
    scheduler.set_timesteps(2)
    sigmas = step_grid(2)
    for i, t in enumerate(scheduler.timesteps):
        wanted = x - m.displacement(0.0, float(sigmas[i] - sigmas[i + 1]))
        x = scheduler.step(pack(m), t, x).prev_sample
        assert torch.equal(x, wanted)


def test_half_precision_outputs_are_integrated_in_float32():
    m, x = mixture(2, 5, dtype=torch.bfloat16), torch.randn(2, 5, 8)
    scheduler = ArcFlowScheduler(num_modes=4)
    assert torch.equal(
        scheduler.step(pack(m), 1000.0, x, return_dict=False)[0], x - m.displacement(0.0, float(1 - step_grid(2)[1]))
    )


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (2, 0.5), (4, 1.0)])
def test_the_uniform_grid_and_mu_of_stock_pipelines_count_steps_only(steps, scale):
    scheduler = ArcFlowScheduler(final_step_scale=scale)
    grid = step_grid(steps, final_step_scale=scale)
    uniform = np.linspace(1.0, 1 / steps, steps)
    for given in ({"num_inference_steps": steps}, {"sigmas": uniform, "mu": 1.15}, {"sigmas": uniform.tolist()}):
        scheduler.set_timesteps(**given)
        assert torch.equal(scheduler.sigmas, grid) and torch.equal(scheduler.timesteps, 1000 * grid[:-1])


def test_custom_noise_levels_are_kept():
    scheduler = ArcFlowScheduler()
    scheduler.set_timesteps(timesteps=[1000.0, 600.0])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.6, 0.0]))
    scheduler.set_timesteps(sigmas=[1.0, 0.3])  # raw times, shifted here as the stock scheduler does
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 3.2 * 0.3 / (1 + 2.2 * 0.3), 0.0]))


def test_noising_follows_the_path():
    x, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    scheduler = ArcFlowScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    sigma = float(scheduler.sigmas[1])
    torch.testing.assert_close(scheduler.scale_noise(x, scheduler.timesteps[1:2], eps), (1 - sigma) * x + sigma * eps)
    scheduler.set_timesteps(4)
    mixed = scheduler.scale_noise(x, scheduler.timesteps[:2], eps)  # one level per sample
    assert torch.equal(mixed[0], eps[0])
    torch.testing.assert_close(mixed[1], (1 - sigma) * x[1] + sigma * eps[1])


def test_a_scheduler_survives_its_config(tmp_path):
    ArcFlowScheduler(num_modes=4, shift=2.0, final_step_scale=0.5).save_pretrained(tmp_path)
    back = ArcFlowScheduler.from_pretrained(tmp_path)
    assert (back.config.num_modes, back.config.shift, back.config.final_step_scale) == (4, 2.0, 0.5)
    assert copy.deepcopy(back).init_noise_sigma == 1.0 and back.order == 1


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda s: s.set_timesteps(0), "at least 1 step"),
        (lambda s: s.set_timesteps(3, sigmas=[1.0, 0.5]), "as many values"),
        (lambda s: s.set_timesteps(sigmas=[0.5, 1.0]), "falling.*num_inference_steps alone"),
        (lambda s: s.set_timesteps(timesteps=[1000.0, 0.0]), "falling.*above 0"),
        (
            lambda s: s.step(torch.ones(1, 5, 8), 1000.0, torch.ones(1, 5, 8)),
            "no student was called.*Is an adapter attached",
        ),
        (lambda s: s.step(torch.ones(1, 5, 60), 1000.0, torch.ones(1, 5, 16)), "4 modes of width 8.*arcflow.attach"),
        (lambda s: s.step(torch.ones(1, 5, 60), 123.0, torch.ones(1, 5, 8)), "one of scheduler.timesteps"),
    ],
)
def test_nonsense_is_refused_with_a_remedy(make, remedy):
    with pytest.raises(ValueError, match=remedy):
        make(ArcFlowScheduler(num_modes=4))
