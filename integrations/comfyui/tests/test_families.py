"""Students of every family that ComfyUI has a model of: the nodes draw what this project draws on diffusers' own."""

import json

import comfy.sd
import pytest
import torch
from arcflow_nodes.adapter import read
from arcflow_nodes.patch import patched
from cases import Case, apart, grid
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow, ModelSamplingSD3
from more_cases import CASES, made
from safetensors.torch import save_file

from arcflow.student.formats import find, tensors_of
from arcflow.student.plain_lora import factors_of, lora_tensors

CLOSE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=CASES)
def coefficients(request, tmp_path_factory) -> Case:
    return made(request.param, tmp_path_factory.mktemp(f"{request.param}-coefficients"), "coefficients")


def test_the_bases_are_one_model(case):
    x = case.tokens(case.noise)
    assert apart(x - case.sample(case.model, 1), case.teacher(x, 1.0)) < CLOSE


@pytest.mark.parametrize("steps", [2, 4])
def test_a_mixture_draws_what_diffusers_draws(case, steps):
    before = case.sample(case.model, 2)
    drawn = case.sample(patched(case.model, read(case.adapter)), steps)
    assert apart(drawn, case.ours(case.tokens(case.noise), grid(steps))) < CLOSE
    assert torch.equal(case.sample(case.model, 2), before)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_student_in_coefficients_draws_the_same(coefficients, steps):
    case = coefficients
    before = case.sample(case.model, 2)
    drawn = case.sample(patched(case.model, read(case.adapter)), steps)
    assert apart(drawn, case.ours(case.tokens(case.noise), grid(steps))) < CLOSE
    assert torch.equal(case.sample(case.model, 2), before)


def test_a_plain_lora_draws_it_with_stock_nodes_alone(coefficients):
    """`export --layout lora --keys comfyui` in Load LoRA, and the stock node that sets the shift."""
    case = coefficients
    found = find(case.adapter)
    lora = lora_tensors(factors_of(tensors_of(found), found.info), "comfyui", found.info.family)
    model, _ = comfy.sd.load_lora_for_models(case.model, None, lora, 1.0, 0.0)
    thousand = getattr(model.get_model_object("model_sampling"), "multiplier", 1) == 1000
    (model,) = ModelSamplingSD3().patch(model, 3.2) if thousand else ModelSamplingAuraFlow().patch_aura(model, 3.2)
    assert apart(case.sample(model, 2), case.ours(case.tokens(case.noise), grid(2))) < CLOSE


def test_an_adapter_of_a_family_that_is_not_here_says_so(tmp_path):
    path = tmp_path / "other.safetensors"
    record = {"family": "qwen_image_21", "modes": 4}
    save_file({"proj_out_means.weight": torch.zeros(1, 1)}, path, {"arcflow": json.dumps(record)})
    with pytest.raises(ValueError, match="'qwen_image_21': ComfyUI has no Qwen-Image 2.1. .* here are flux, flux2"):
        read(path)
