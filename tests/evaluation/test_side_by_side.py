"""Comparing: every row from the same noise, numbers that mean what they say, the pipeline left as it came."""

import copy

import numpy as np
import pytest
import torch

from arcflow import save_adapter, student
from arcflow.evaluation.results import Evaluation, EvaluationAbout, Result
from arcflow.evaluation.side_by_side import ROWS, compare, tracks
from arcflow.families import network
from arcflow.sampling.generate import PARTS, generate, stock_euler
from arcflow.system import records
from arcflow.system.packages import about
from tests.support.pipelines import SIDE, perturb

pytestmark = pytest.mark.slow

SIZE = {"height": SIDE, "width": SIDE}
PROMPTS = ["a red cube", "a blue ball"]


@pytest.fixture
def adapter(flux, tmp_path):
    """A student that is not quite its teacher."""
    net = copy.deepcopy(flux.transformer)
    student.build(net, modes=4, rank=4, generator=torch.Generator().manual_seed(1))
    perturb(net, 0.02)
    return save_adapter(net, tmp_path / "adapter")


def bright(images, prompts) -> dict[str, float]:
    return {"overall": float(np.mean(images)) / 255, "counting": 1.0}


def test_every_row_has_every_number(flux, adapter) -> None:
    results, samples = compare(flux, adapter, PROMPTS, accuracy=bright, seeds=2, batch_size=3, **SIZE)
    assert list(results) == list(samples) == list(ROWS)
    assert {row: result.nfe for row, result in results.items()} == {row: ROWS[row][1] for row in ROWS}
    assert results["teacher_50"].mse_to_teacher == 0
    for row, result in results.items():
        assert set(result.seconds) == set(PARTS)
        assert result.seconds_per_image == pytest.approx(sum(result.seconds.values()))
        assert (result.prompts, result.seeds) == (2, 2)
        assert result.accuracy == bright(samples[row].images, PROMPTS)
        assert len(samples[row].images) == 4


def test_the_distance_is_that_of_final_latents_from_the_same_noise(flux, adapter) -> None:
    results, _ = compare(flux, adapter, PROMPTS, accuracy=bright, first_seed=5, **SIZE)
    with stock_euler(flux):
        teacher = generate(flux, PROMPTS, [5, 6], steps=50, **SIZE).latents
        four = generate(flux, PROMPTS, [5, 6], steps=4, **SIZE).latents
    assert results["euler_4"].mse_to_teacher == pytest.approx(float((four - teacher).square().mean()))


def test_the_pipeline_is_left_as_the_teacher_it_was(flux, adapter) -> None:
    before, scheduler = copy.deepcopy(flux.transformer.state_dict()), flux.scheduler
    compare(flux, adapter, PROMPTS, accuracy=bright, **SIZE)
    tracks(flux, adapter, PROMPTS[0], 0, **SIZE)
    after = flux.transformer.state_dict()
    assert flux.scheduler is scheduler
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tracks_start_at_the_noise_and_arcs_join_up(flux, adapter) -> None:
    way = tracks(flux, adapter, PROMPTS[0], 3, **SIZE)
    noise = network.noise(flux, [3], SIDE, SIDE).flatten()
    for start in (way.teacher[0], way.chords[0], way.arcs[0][0]):
        assert torch.equal(start, noise)
    assert (len(way.teacher), len(way.chords), len(way.arcs)) == (51, 3, 2)
    assert torch.equal(way.arcs[0][-1], way.arcs[1][0])


def test_arcs_end_where_the_sampled_student_does(flux, adapter) -> None:
    _, samples = compare(flux, adapter, PROMPTS[:1], accuracy=bright, first_seed=3, **SIZE)
    way = tracks(flux, adapter, PROMPTS[0], 3, **SIZE)
    assert torch.allclose(way.arcs[-1][-1], samples["arcflow_2"].latents.flatten(), atol=1e-4)
    assert np.abs(way.ends["arcs"].astype(int) - samples["arcflow_2"].images[0]).max() <= 1


def test_results_say_what_made_them(tmp_path) -> None:
    row = Result(nfe=1, seconds_per_image=1.0, seconds={}, mse_to_teacher=0.0, accuracy={}, prompts=1, seeds=1)
    made = EvaluationAbout(**about(command="arcflow demo", adapter="world"))
    records.write(tmp_path / "new" / "results.json", Evaluation(**dict.fromkeys(ROWS, row), about=made))
    stored = records.read(Evaluation, tmp_path / "new" / "results.json")
    assert list(stored.rows) == list(ROWS) and stored.about.command == "arcflow demo"
    assert stored.about.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
