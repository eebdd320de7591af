"""A list that grows while a run goes on: refused by name, or gone on with, what was held out staying so."""

import dataclasses
import shutil

import pytest

from arcflow.config import Data
from arcflow.data.batches import open_prompts
from arcflow.data.embeddings import embedded
from arcflow.system.processes import Ranks
from arcflow.training.home import claim_run, contents_of, keep_held_out, prompts_of
from arcflow.training.loop import train
from benchmarks import damaged_caches
from tests.support.trainings import config, quiet, tiny_pipe


def write(path, count):
    path.write_text("".join(f"a red ring {i}\n" for i in range(count)))


def begin(run, said=quiet):
    """What a training does before its first iteration, as far as prompts go."""
    data = open_prompts(prompts_of(run), seed=0, batch=4)
    claim_run(run, Ranks(), contents_of(data, None, run.data.embeddings), said)
    (claim_run(run, Ranks(), write=False) / "log.jsonl").touch()
    keep_held_out(run, data.held_out.prompts)
    return data


def test_a_list_that_grew_is_refused_and_may_be_gone_on_with(tmp_path):
    write(tmp_path / "list.txt", 12)
    run = config(tmp_path / "run", data__prompts=str(tmp_path / "list.txt"))
    held_out = begin(run).held_out
    write(tmp_path / "list.txt", 18)
    with pytest.raises(ValueError, match="holds a run with another .*prompts: .*with --data.grown, or choose another"):
        begin(run)
    said = []
    grown = dataclasses.replace(run, data=dataclasses.replace(run.data, grown=True))
    for _ in range(2):
        data = begin(grown, said.append)
        assert data.held_out == held_out and len(data.train) == 15
        assert not {row.text for row in data.train} & set(held_out.prompts)
    assert said == [f"{tmp_path / 'run'} goes on with another list of prompts; what was held out stays so"]
    assert len(begin(dataclasses.replace(run, out=str(tmp_path / "own"))).train) == 15
    (tmp_path / "run" / "held_out.jsonl").unlink()
    with pytest.raises(ValueError, match="held_out.jsonl is not there, which has what was held out"):
        begin(grown)


def test_the_same_list_and_the_same_embeddings_may_lie_elsewhere(tmp_path):
    write(tmp_path / "list.txt", 12)
    about = embedded("world", None)
    damaged_caches.make(tmp_path / "cache", about=about)
    data = Data(prompts=str(tmp_path / "list.txt"), held_out_count=3, embeddings=str(tmp_path / "cache"))
    begin(config(tmp_path / "run", data=data))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "list.txt", tmp_path / "elsewhere" / "same.txt")
    damaged_caches.make(tmp_path / "elsewhere" / "cache", about=about, shard=4)
    moved = dataclasses.replace(
        data, prompts=str(tmp_path / "elsewhere" / "same.txt"), embeddings=str(tmp_path / "elsewhere" / "cache")
    )
    begin(config(tmp_path / "run", data=moved))
    shutil.rmtree(tmp_path / "elsewhere" / "cache")
    damaged_caches.make(tmp_path / "elsewhere" / "cache", about=about, dtype="bfloat16")
    with pytest.raises(ValueError, match="holds a run with another set of embeddings"):
        begin(config(tmp_path / "run", data=moved))


@pytest.mark.slow
def test_a_run_goes_on_with_a_longer_list(tmp_path):
    write(tmp_path / "list.txt", 12)
    run = config(tmp_path / "run", data__prompts=str(tmp_path / "list.txt"), optim__iterations=3, pictures=0)
    train(dataclasses.replace(run, stop_after=1e-9), tiny_pipe(), quiet)
    ends = (tmp_path / "run" / "held_out.safetensors").read_bytes()
    write(tmp_path / "list.txt", 18)
    with pytest.raises(ValueError, match="--data.grown"):
        train(run, tiny_pipe(), quiet)
    train(dataclasses.replace(run, data=dataclasses.replace(run.data, grown=True)), tiny_pipe(), quiet)
    assert (tmp_path / "run" / "adapter").is_dir()
    assert (tmp_path / "run" / "held_out.safetensors").read_bytes() == ends
