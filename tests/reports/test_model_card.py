"""From a run folder to something that others can use."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

import arcflow
from arcflow import student
from arcflow.config import to_json
from arcflow.recipes import flux
from arcflow.reports import model_card
from arcflow.student import adapter, formats
from arcflow.student.state import is_student
from tests.support.pipelines import perturb, sample

RECORD = {
    "settings": {
        "data": {"prompts": "prompts.txt", "height": 1024, "width": 1024},
        "optim": {"batch": 384, "lr": 1e-4},
    },
    "progress": {"step": 10_000, "seconds": 7200.0, "distance": 0.0123},
}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "shipped.json"


@pytest.fixture
def made(flux, tmp_path):
    """A run folder: an adapter and its log."""
    net = student.build(copy.deepcopy(flux.transformer), modes=4, rank=2)
    perturb(net)
    info = formats.AdapterInfo(base="black-forest-labs/FLUX.1-dev", guidance=3.5, training=RECORD)
    lines = [{"step": i, "loss": 1 / i, "distance": 2 / i} for i in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return adapter.save_adapter(net, tmp_path / "adapter", info=info)


def test_the_card_tells_what_the_record_knows(made, tmp_path):
    out = model_card.export(
        str(made), tmp_path / "out", log=tmp_path / "log.jsonl", results=RESULTS, name="someone/two-steps"
    )
    read = ModelCard.load(out / "README.md")
    assert (read.data.base_model, read.data.license) == ("black-forest-labs/FLUX.1-dev", "other")
    assert "non-commercial" in read.data.license_name
    for words in ('attach(pipe, "someone/two-steps")', "10000 of 384", "2.0 h", "0.0123", "| guidance | 3.5 |", "87"):
        assert words in read.text
    assert "command" not in read.text  # a record this short does not tell it
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "arcflow.json",
        "curves.png",
    ]


def test_an_export_may_be_one_file(flux, made, tmp_path):
    out = model_card.export(str(made), tmp_path / "out", layout="file")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter.safetensors"]
    drawn = sample(arcflow.attach(flux, out / "adapter.safetensors"))
    assert torch.equal(drawn, sample(arcflow.attach(flux, made)))
    back = model_card.export(str(out / "adapter.safetensors"), tmp_path / "back")
    assert all((back / name).read_bytes() == (made / name).read_bytes() for name in formats.FILES["arcflow"])


def test_the_card_tells_a_range_of_guidance(made):
    info = dataclasses.replace(adapter.read_info(made), guidance_range=(1.5, 5.0))
    assert "| guidance | 1.5 to 5, as you choose; 3.5 by default |" in model_card.card(info, "someone/one").text


def test_the_card_has_the_command_that_makes_the_run_again(made, tmp_path):
    settings = json.loads(to_json(dataclasses.replace(flux(), seed=7)))
    info = dataclasses.replace(adapter.read_info(made), training={"settings": settings})
    assert "| command | `arcflow train flux --seed 7` |" in model_card.card(info, "someone/two-steps").text


def test_nothing_is_made_up_where_the_record_is_silent(flux, tmp_path):
    net = student.build(copy.deepcopy(flux.transformer), modes=4, rank=2)
    silent = adapter.save_adapter(net, tmp_path / "adapter")
    text = (model_card.export(str(silent), tmp_path / "out") / "README.md").read_text()
    for heading in ("How it was trained", "Results", "curves.png", "license:"):
        assert heading not in text


@pytest.mark.slow
def test_to_the_authors_layout_and_back_it_is_the_same_student(flux, made, tmp_path):
    def drawn(folder):
        arcflow.attach(flux, folder)
        try:
            return sample(flux)
        finally:
            arcflow.detach(flux)

    there = model_card.export(str(made), tmp_path / "there", layout="published", transformer=flux.transformer)
    back = model_card.export(str(there), tmp_path / "back", transformer=flux.transformer)
    assert not is_student(flux.transformer)
    assert torch.equal(drawn(there), drawn(back))
    torch.testing.assert_close(drawn(back), drawn(made), rtol=1e-2, atol=1e-2)  # the authors store float16
    again = model_card.export(str(there), tmp_path / "again", transformer=flux.transformer.bfloat16())
    one, other = (load_file(folder / "adapter.safetensors") for folder in (back, again))
    assert one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )  # at whatever precision the base is read
    with pytest.raises(ValueError, match="not in the layout 'published'.*give --model"):
        model_card.export(str(made), tmp_path / "other", layout="published")


def test_pushing_names_the_repository_and_its_address(made, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **more: f"https://huggingface.co/{name}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: pushed.update(given))
    out = model_card.export(str(made), tmp_path / "out")
    assert model_card.push(out, "someone/two-steps") == "https://huggingface.co/someone/two-steps"
    assert (pushed["repo_id"], pushed["folder_path"]) == ("someone/two-steps", out)


def test_a_push_that_fails_leaves_the_folder_and_a_remedy(made, tmp_path, monkeypatch):
    def offline(self, name, **more):
        raise OSError("no connection")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    with pytest.raises(ValueError, match=r"no connection.*run `hf auth login`"):
        model_card.push(made, "someone/two-steps")
    with pytest.raises(ValueError, match="expected owner/name"):
        model_card.push(made, "two-steps")
