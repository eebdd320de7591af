"""`arcflow export` as a user types it: options are held against one another and the adapter before a base is loaded."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arcflow import cli, student
from arcflow.path import step_grid
from arcflow.sampling import open
from arcflow.sampling.plain import latent_difference
from arcflow.student import adapter
from arcflow.student.plain_lora import LORA
from arcflow.student.record import AdapterInfo
from tests.support.pipelines import SIDE, draws, fresh, perturb


def refused(capsys, *words: object) -> str:
    """What an export says when it is refused."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *map(str, words)])
    assert stop.value.code == 1
    return capsys.readouterr().err


def coefficients(pipe, folder, **info):
    """An adapter in coefficients for this pipeline, which is left alone."""
    record = AdapterInfo(**info)
    net = fresh(pipe).transformer
    student.build(net, form="coefficients", modes=4, rank=2, alpha=4.0, grids=record.grids, generator=draws())
    perturb(net)
    return adapter.save_adapter(net, folder, info=record)


def test_the_record_of_the_shipped_adapter_vouches_for_its_tensors() -> None:
    found = adapter.found_at(open.adapter_of("world", "world"))
    assert found.info.sha256 == {found.weights.name: hashlib.sha256(found.weights.read_bytes()).hexdigest()}


@pytest.mark.slow
def test_the_shipped_adapter_is_exported_by_its_name(tmp_path, capsys) -> None:
    shipped = adapter.found_at(open.adapter_of("world", "world"))
    cli.main(["export", "--adapter", "world", "--out", str(tmp_path / "out")])
    again = adapter.found_at(tmp_path / "out")
    assert again.info.sha256[again.weights.name] == hashlib.sha256(again.weights.read_bytes()).hexdigest()
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (64, 64)
    before, after = load_file(shipped.weights), load_file(again.weights)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--adapter", "none"), "--adapter none has nothing to export"),
        (("--layout", "merged"), "--layout merged is a copy of the base's folder: expected that; give --model"),
        (("--layout", "published", "--model", "some/model"), "holds mixtures, this student is in coefficients"),
        (("--keys", "kohya"), "expected --layout lora with it"),
        (("--bound", "nan"), "--bound = nan: expected 0 or more"),
        (("--push", "two-steps"), "expected owner/name on the Hugging Face Hub"),
        (("--private",), "expected --push owner/name too"),
        (("--results", "nowhere.json"), "no file nowhere.json"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_loaded(words, said, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(open, "open_transformer", lambda *_: pytest.fail("a base was loaded"))
    words = words if "--adapter" in words else ("--adapter", "world", *words)
    assert said in refused(capsys, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layout", "lora"), "is a mixture, of which a LoRA is made and measured on its base: expected that base"),
        (("--layout", "published", "--model", "some/model"), "its LoRA on feed-forward layers, this student on 'all'"),
    ],
)
def test_what_a_mixture_is_not_made_into_is_said_before_its_base_is_loaded(
    words, said, flux, capsys, tmp_path, monkeypatch
) -> None:
    net = student.build(fresh(flux).transformer, modes=4, rank=2, targets="all", generator=draws())
    made = adapter.save_adapter(net, tmp_path / "adapter")
    monkeypatch.setattr(open, "open_transformer", lambda *_: pytest.fail("a base was loaded"))
    assert said in refused(capsys, "--adapter", made, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", open.ADAPTERS)
def test_a_shipped_adapter_leaves_as_a_plain_lora_that_draws_the_same(name, tmp_path) -> None:
    shipped = open.adapter_of("world", name)
    cli.main(["export", "--adapter", name, "--layout", "lora", "--out", str(tmp_path / "lora")])
    pipe = open.open_pipe("world", "cpu", "float32")
    size = dict(height=64, width=64, guidance_scale=3.5)
    apart = latent_difference(pipe, shipped, tmp_path / "lora" / LORA["diffusers"], prompts=["a red cube"], **size)
    assert apart < 1e-5


def test_an_adapter_is_not_exported_over_itself(tmp_path, capsys) -> None:
    own = Path(shutil.copytree(open.adapter_of("world", "world"), tmp_path / "adapter"))
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert "is the adapter's own folder" in refused(capsys, "--adapter", own, "--out", own / ".." / "adapter")
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_a_student_of_several_steps_leaves_as_a_lora_at_the_least_of_them(flux, tmp_path) -> None:
    """There alone every step is the student's own, and no bend is left behind."""
    made = coefficients(flux, tmp_path / "adapter", steps=4, also_steps=(2, 8))
    cli.main(["export", "--adapter", str(made), "--layout", "lora", "--out", str(tmp_path / "lora")])
    size = dict(height=SIDE, width=SIDE, max_sequence_length=8, guidance_scale=3.5)
    lora = tmp_path / "lora" / LORA["diffusers"]
    assert latent_difference(flux, made, lora, prompts=["a red cube"], **size) < 1e-5
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "2 network calls for an image" in card and "num_inference_steps=2" in card
    assert ", ".join(f"{level:.4g}" for level in step_grid(2).tolist()) in card
    assert json.loads((made / "arcflow.json").read_text())["steps"] == 4
