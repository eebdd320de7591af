"""Several processes, as the guide starts them: one image drawn together, and a list of images shared out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import arcflow
from arcflow import student
from arcflow.sampling.folder import read_manifest
from arcflow.student import adapter
from arcflow.system import hub
from tests.support.pipelines import flux_pipeline, perturb, torchrun

GUIDE = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text("utf-8")
(TOGETHER,) = (block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "dist." in block)
(SHARED,) = re.findall(r"    (torchrun .* sample (?:.*\\\n)*.*)\n", GUIDE)


def pipeline():
    """The same in every process; images of 16 x 16 unless told otherwise."""
    torch.manual_seed(0)
    pipe = flux_pipeline()
    pipe.default_sample_size = 8
    return pipe


def latents_of(pipe) -> list[torch.Tensor]:
    """What its autoencoder is given from now on."""
    given: list[torch.Tensor] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    return given


def work(folder: Path) -> None:
    """The guide's script in each process: a CPU for a card, a tiny pipeline for FLUX.1-dev."""
    torch.accelerator.device_count = lambda: 2  # diffusers asks before it makes its mesh
    torch.cuda.set_device = lambda rank: None
    pipe, tokens = pipeline(), []
    latents = latents_of(pipe)
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, inputs, named: tokens.append(named["hidden_states"].shape[1]), with_kwargs=True
    )
    FluxPipeline.from_pretrained = lambda name, **more: pipe  # type: ignore[method-assign]
    hub.fetch = lambda repository, patterns: folder
    exec(compile(TOGETHER.replace('cuda")', 'cpu")').replace("nccl", "gloo"), "sampling.md", "exec"), {})
    assert tokens == [8, 8], "each process has half of the sixteen tokens, in both steps"
    if os.environ["RANK"] == "0":
        torch.save(latents[0], folder / "latents.pt")


@pytest.mark.slow
def test_two_processes_draw_the_image_of_one(tmp_path) -> None:
    pipe = pipeline()
    made = student.build(pipeline().transformer, modes=4, rank=2)
    perturb(made)
    arcflow.attach(pipe, adapter.save_adapter(made, tmp_path / "arcflow-flux-2steps"))
    alone = latents_of(pipe)
    pipe("a red cube on a blue sphere", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    torchrun(2, __file__, tmp_path, folder=tmp_path)
    together = torch.load(tmp_path / "latents.pt", weights_only=True)
    torch.testing.assert_close(together, alone[0], rtol=1e-5, atol=1e-6)
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (16, 16)


@pytest.mark.slow
def test_two_processes_share_a_list_and_one_finds_nothing_left(tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ring on white\na blue square on white\na green circle on white\n")
    words = SHARED.replace("\\\n", " ").split()
    words[words.index("--model") + 1] = words[words.index("--adapter") + 1] = "world"
    command = words[words.index("-m") :]
    torchrun(2, *command, folder=tmp_path)
    manifests = sorted(path.name for path in (tmp_path / "images").glob("manifest*"))
    assert manifests == ["manifest-0-of-2.jsonl", "manifest-1-of-2.jsonl"]
    assert len(read_manifest(tmp_path / "images")) == len(list((tmp_path / "images").glob("*.png"))) == 3
    again = subprocess.check_output([sys.executable, *command], cwd=tmp_path, text=True)
    assert "new images: 0; in images: 3 of 3" in again


def test_the_student_goes_on_before_the_work_is_split(flux) -> None:
    flux.transformer._parallel_config = object()  # what enable_parallelism leaves
    with pytest.raises(ValueError, match="attach the adapter first, then call enable_parallelism"):
        student.build(flux.transformer)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
