"""A run that learns from walks it kept: how often the teacher is asked, and what an interruption changes."""

import sys
from pathlib import Path

import pytest
import torch

from arcflow.config import ALWAYS
from arcflow.system import files
from arcflow.training.loop import train
from tests.support.pipelines import torchrun
from tests.support.trainings import ITERATIONS, config, newest_tensors, quiet, tiny_pipe

KEPT = {"distill__hold": ALWAYS, "distill__reuse": 3, "distill__kept": 2, "pictures": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run in micro-batches of two, and what it said."""
    messages, folder = [], tmp_path_factory.mktemp("kept")
    train(config(folder, optim__micro_batch=2, **KEPT), tiny_pipe(), messages.append)
    return folder, messages


@pytest.mark.slow
def test_one_iteration_of_three_asks_the_teacher(run):
    folder, messages = run
    lines = [line for line in files.read_lines(folder / "log.jsonl") if "loss" in line]
    new = [line["step"] for line in lines if "velocity_error" in line]
    again = [line["step"] for line in lines if "velocity_error_kept" in line]
    assert new == [1, 4, 7, 10] and sorted(new + again) == list(range(1, ITERATIONS + 1))
    assert any(message.startswith("kept walks: up to 2 batches") for message in messages)


@pytest.mark.slow
def test_the_walks_are_in_the_checkpoint(run):
    walks = [name for name in newest_tensors(run[0]) if name.startswith("walk.0-1.")]
    assert {name.split(".")[2] for name in walks} == {"00000", "00001"}  # batches
    assert {name.split(".")[3] for name in walks} == {"000", "001"}  # micro-batches


@pytest.mark.slow
def test_every_number_of_calls_has_its_turn(tmp_path):
    """Where every second iteration asks the teacher, the numbers of calls take turns among these."""
    run = config(tmp_path, distill__also_steps=(1,), **KEPT | {"distill__reuse": 2, "distill__kept": 4})
    train(run, tiny_pipe(), quiet)
    walks = {name.split(".")[4] for name in newest_tensors(tmp_path) if name.endswith("targets")}
    assert walks == {"0-1", "0-2", "1-2"}  # segment and number of segments


@pytest.mark.slow
@pytest.mark.parametrize("starts", [2, 3])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(run, tmp_path, starts):
    """Between two iterations on kept walks, and before one that asks the teacher."""
    for _ in range(starts):
        train(config(tmp_path, optim__micro_batch=2, stop_after=1e-9, **KEPT), tiny_pipe(), quiet)
    train(config(tmp_path, optim__micro_batch=2, **KEPT), tiny_pipe(), quiet)
    whole, found = newest_tensors(run[0]), newest_tensors(tmp_path)
    assert whole.keys() == found.keys()
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []
    assert (tmp_path / "log.jsonl").read_bytes() == (run[0] / "log.jsonl").read_bytes()


def test_walks_that_do_not_fit_into_memory_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"distill\.kept = 1000000000: expected fewer: .* GB"):
        train(config(tmp_path / "run", distill__hold=ALWAYS, distill__reuse=2, distill__kept=10**9), tiny_pipe(), quiet)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_each_of_two_processes_takes_up_its_own_walks_and_another_number_begins_anew(tmp_path):
    torchrun(2, __file__, "whole", tmp_path)
    torchrun(2, __file__, "parts", tmp_path)
    whole, parts = newest_tensors(tmp_path / "whole"), newest_tensors(tmp_path / "parts")
    assert {name.split(".")[1] for name in whole if name.startswith("walk.")} == {"0-2", "1-2"}
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []

    messages = []
    train(config(tmp_path / "parts", **KEPT | {"optim__iterations": 14}), tiny_pipe(), messages.append)
    assert any("holds no walks of as many processes" in message for message in messages)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2]) / sys.argv[1]
    for _ in range(3 if sys.argv[1] == "parts" else 0):
        train(config(folder, stop_after=1e-9, **KEPT), tiny_pipe(), quiet)
    train(config(folder, **KEPT), tiny_pipe(), quiet)
