"""Editing models: the image to edit stands beside x as their stock pipelines put it, and a student learns so."""

import copy
import importlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from arcflow import cli
from arcflow.config import Data
from arcflow.data.prompts import read_prompts
from arcflow.distillation.walk import guided
from arcflow.families import network
from arcflow.families.conditioning import against
from arcflow.sampling import open as opening
from arcflow.sampling.generate import generate, stock_euler
from arcflow.system import files
from arcflow.training.loop import train
from tests.support.editing import editing_pipeline
from tests.support.families import SIDE
from tests.support.pipelines import fresh
from tests.support.trainings import config

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

KINDS = ("FluxKontextPipeline", "Flux2KleinPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")


def size(pipe: Any) -> int:
    """Side of an image: FLUX.2's pipelines take none below 64 pixels."""
    return 64 if "Flux2" in type(pipe).__name__ else SIDE


def pictures(count: int = 1, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8)


class Noting(FlowMatchEulerDiscreteScheduler):
    """Keeps the velocities and states that it was given."""

    def step(self, model_output, timestep, sample, **how):
        self.taken.append((model_output, sample))
        return super().step(model_output, timestep, sample, **how)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture(params=KINDS)
def pipe(request, made, pristine, monkeypatch):
    """A tiny stock pipeline that edits, at the size that it is given."""
    if request.param not in made:
        made[request.param] = editing_pipeline(request.param, pristine)
    pipe = copy.copy(made[request.param])
    module = importlib.import_module(type(pipe).__module__)
    if hasattr(module, "calculate_dimensions"):  # which enlarges an image to a million pixels
        answer = (SIDE, SIDE) if "Plus" in request.param else (SIDE, SIDE, None)
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: answer)
    return pipe


def edited(
    pipe, prompt: str, image: np.ndarray, guidance: float | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(velocity, state) of each step of the stock pipeline."""
    pipe.scheduler = Noting(shift=3.2)
    pipe.scheduler.taken = taken = []
    name = type(pipe).__name__
    told: dict[str, Any] = {"guidance_scale": 1.0} if "Flux2" in name else {"true_cfg_scale": 1.0}
    if name == "FluxKontextPipeline":
        told |= {"_auto_resize": False, "max_area": SIDE**2, "guidance_scale": 3.5, "max_sequence_length": 8}
    if guidance:
        told |= {"true_cfg_scale": guidance, "negative_prompt": ""}
    pipe(
        image=Image.fromarray(image),
        prompt=prompt,
        height=size(pipe),
        width=size(pipe),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **told,
    )
    return taken


def test_the_velocity_is_that_of_the_stock_pipeline(pipe):
    image = pictures(side=size(pipe))
    length = 8 if "Kontext" in type(pipe).__name__ else None
    taken = edited(pipe, "a red cube", image[0])
    cond = network.encode_edits(pipe, ["a red cube"], image, max_sequence_length=length)
    for (v, x), sigma in zip(taken, pipe.scheduler.sigmas.tolist(), strict=False):
        torch.testing.assert_close(network.call(pipe.transformer, x, sigma, cond), v, rtol=1e-5, atol=1e-5)
    assert len(taken) == 2


def test_another_image_is_another_velocity(pipe):
    x, one = network.noise(pipe, [0], SIDE, SIDE), pictures(2)
    velocities = [
        network.call(pipe.transformer, x, 0.5, network.encode_edits(pipe, ["a ball"], one[i : i + 1])) for i in (0, 1)
    ]
    assert not torch.allclose(*velocities, atol=1e-4)


def test_guidance_is_against_the_empty_instruction_for_the_same_image(pipe):
    """As the stock pipeline has it, whose text encoder sees the image there too."""
    if "Qwen" not in type(pipe).__name__:
        pytest.skip("its text encoder sees no image")
    image = pictures()
    taken = edited(pipe, "a red cube", image[0], guidance=3.0)
    cond = network.encode_edits(pipe, ["a red cube"], image, second=True)
    assert set(against(cond)) == {"encoder_hidden_states", "encoder_hidden_states_mask"}
    teacher = guided(lambda x, sigma, cond: network.call(pipe.transformer, x, sigma, cond), {}, 3.0)
    v, x = taken[0]
    plain = network.call(pipe.transformer, x, 1.0, cond)
    mixed = teacher(x, torch.ones(1), cond)
    # the stock pipeline takes the norm back
    torch.testing.assert_close(
        mixed * plain.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True), v, rtol=1e-4, atol=1e-5
    )


# A training


def listed(folder, sources: str, count: int = 8, **odd: Any) -> Data:
    """A list of instructions with an image to edit each, or with words for it."""
    rows = []
    for i in range(count):
        Image.fromarray(pictures(side=24 + i)[0]).save(folder / f"{i}.png")
        source = f"{i}.png" if sources == "files" else ("a red cube", "a blue ball")[i % 2]
        rows.append({"prompt": f"make it {'red' if i % 2 else 'green'} {i}", "source": source})
    for place, source in odd.items():
        rows[int(place.removeprefix("row_")) - 1]["source"] = source
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes: dict[str, Any] = {"height": SIDE, "width": SIDE, "teacher_steps": 2, "held_out_count": 2}
    return Data(prompts=str(folder / "edits.jsonl"), sources=sources, cache=False, **sizes)


def learned(pipe, folder, data: Data, **changes: Any):
    """(log lines with a loss, the folder) of a short training."""
    pipe = fresh(pipe)
    run = config(folder, data=data, optim__iterations=2, optim__batch=2, eval_every=2, **changes)
    out = train(run, pipe, lambda message: None)
    return [line for line in files.read_lines(out / "log.jsonl") if "loss" in line], out


@pytest.mark.slow
def test_a_student_learns_to_edit(pipe, tmp_path):
    """Its loss depends on the image, and its folder is like any other."""
    guidance = {"distill__teacher_cfg": 3.0} if "Kontext" not in type(pipe).__name__ else {}
    lines, out = learned(pipe, tmp_path / "run", listed(tmp_path, "files"), **guidance)
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
    assert (out / "adapter").is_dir()
    moved = listed(tmp_path, "files", **{f"row_{i}": "0.png" for i in range(1, 9)})
    others, _ = learned(pipe, tmp_path / "other", moved, **guidance)
    assert others[0]["loss"] != lines[0]["loss"]


@pytest.mark.slow
def test_without_images_the_teacher_draws_what_is_edited(pipe, tmp_path):
    data = listed(tmp_path, "drawn")
    if "Qwen" in type(pipe).__name__:
        with pytest.raises(ValueError, match="edits images and draws none from words alone"):
            learned(pipe, tmp_path / "run", data)
        return
    lines, out = learned(pipe, tmp_path / "run", data)
    drawn = sorted((out / "sources").iterdir())
    assert len(drawn) == 2 and len(lines) == 2
    with Image.open(drawn[0]) as image:
        assert image.size == (SIDE, SIDE)


def test_rows_without_an_image_to_edit_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    data = listed(tmp_path, "files", row_2="", row_3="nowhere.png", row_5="broken.png")
    rows, message = read_prompts(data.prompts, sources="files")
    assert len(rows) == 5 and message is not None
    for wrong in ("1 without an image to edit (line 2)", "is not there (line 3)", "cannot be read (line 5)"):
        assert wrong in message
    with pytest.raises(ValueError, match="edits.jsonl, line 2: without an image to edit"):
        read_prompts(data.prompts, sources="files", strict=True)
    assert len(read_prompts(data.prompts)[0]) == 8  # a column of that name means nothing else


def test_a_family_without_an_editing_model_is_told(tmp_path):
    from tests.support.families import MORE

    with pytest.raises(
        ValueError, match="sd3 has no editing model that is carried: expected one of flux, qwen_image, flux2"
    ):
        network.encode_edits(MORE["sd3"](), ["a"], pictures())


def test_settings_that_do_not_go_with_images_to_edit(tmp_path):
    for wrong in ({"cache": True}, {"prompts": "world"}, {"frames": 5}, {"grown": True}):
        told = {"prompts": "p.jsonl", "sources": "files", "cache": False} | wrong
        with pytest.raises(ValueError, match="data.sources|data.cache|data.grown"):
            Data(**told)


# Drawing


def drawing(pipe: Any, folder: Any, monkeypatch: Any) -> None:
    """What commands find of this pipeline: its configurations on the disk, the rest as it is here."""
    net = pipe.transformer
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(dict(net.config)))
    told = {"_class_name": type(pipe).__name__, "transformer": ["diffusers", type(net).__name__]}
    (folder / "model_index.json").write_text(json.dumps(told))
    monkeypatch.setattr(opening.Setup, "base", lambda setup: pipe)
    monkeypatch.setattr(opening.Setup, "model_weights", "")
    monkeypatch.setattr(opening, "token_of", lambda configs: 8)


@pytest.mark.slow
def test_an_image_is_edited_from_the_command_line_as_its_pipeline_edits_it(pipe, tmp_path, monkeypatch, capsys):
    """By the option for all prompts and by a list's column alike: the file the stock pipeline draws, under its name."""
    drawing(pipe, tmp_path, monkeypatch)
    side = size(pipe)
    Image.fromarray(pictures(side=side)[0]).save(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": "a red cube", "source": "a.png"}))
    model = ["sample", "--model", str(tmp_path), "--adapter", "none", "--steps", "2", "--device", "cpu"]
    one, listed = tmp_path / "one", tmp_path / "listed"
    cli.main([*model, "--prompt", "a red cube", "--image", str(tmp_path / "a.png"), "--out", str(one)])
    cli.main([*model, "--prompts", str(tmp_path / "list.jsonl"), "--sources", "--out", str(listed)])
    capsys.readouterr()
    (first,), (second,) = (list(folder.glob("a-red*.png")) for folder in (one, listed))
    shown = np.asarray(Image.open(first))
    assert first.name == second.name and np.array_equal(shown, np.asarray(Image.open(second)))
    with stock_euler(pipe):
        plain = generate(pipe, ["a red cube"], [0], steps=2, height=side, width=side, sources=[str(tmp_path / "a.png")])
    assert shown.shape == (side, side, 3) and np.array_equal(plain.images[0], shown)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--image", "a.png"), "an image to edit: world is a FluxPipeline, which reads none: expected FLUX.1 Kontext"),
        (("--sources",), "--sources: expected --prompts FILE with a column source beside it"),
        (("--image", "a.png", "--sources"), "expected one"),
    ],
)
def test_an_image_that_nothing_edits_is_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--prompt", "a red ring", "--device", "cpu", *words])
    assert said in capsys.readouterr().err
