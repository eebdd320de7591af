"""The guides' Python runs as it stands, on tiny models in place of the large ones."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import perturb, save_style

from arcflow import adapter, student

GUIDES = Path(__file__).parent.parent / "docs"


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (GUIDES / name).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def small_world(flux, tmp_path, monkeypatch):
    """Names that the guides use lead to tiny models and to files here."""
    net = student.build(copy.deepcopy(flux.transformer), modes=4, rank=2)
    perturb(net)
    adapter.save_adapter(net, tmp_path / "hub" / "arcflow-flux-2steps", layout="published")
    save_style(flux, tmp_path / "path/to/style", ["to_q", "ff.net.2"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter, "_fetched", lambda repository, inside: tmp_path / "hub")
    monkeypatch.setattr(type(flux), "from_pretrained", lambda *names, **more: flux)
    monkeypatch.setattr(type(flux.transformer), "from_pretrained", lambda *names, **more: flux.transformer)
    monkeypatch.setattr(type(flux), "to", lambda pipe, device: pipe)
    flux.transformer.register_to_config(sample_size=8)
    flux.default_sample_size = 8


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("quantized", [False, True])
def test_the_blocks_of_a_guide_run_one_after_the_other(small_world, quantized, guide="sampling.md"):
    if quantized:
        pytest.importorskip("torchao")
    names: dict = {}
    torch.manual_seed(0)
    for block in [block for block in blocks(guide) if quantized or "torchao" not in block]:
        exec(compile(block, guide, "exec"), names)
    assert names["image"].size == (16, 16)
