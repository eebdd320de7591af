"""What a command draws with is settled before weights are read: adapter, steps, guidance, size, fit, digests."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from diffusers import Flux2KleinPipeline

from arcflow import attach, student
from arcflow.families import FAMILIES, fit, memory
from arcflow.sampling import generate, open
from arcflow.sampling.open import settle
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter
from arcflow.student.adapter import save_adapter
from arcflow.student.record import AdapterInfo
from tests.support.pipelines import PIPELINES, SIDE, draws, flux2_transformer, fresh, klein_pipeline

CPU = Machine(device="cpu")
SIZE = Drawing(height=SIDE, width=SIDE)


def drawn(pipe, **more) -> generate.Samples:
    """One image in two steps."""
    return generate.generate(pipe, ["a red cube"], [0], steps=2, height=SIDE, width=SIDE, **more)


@pytest.fixture(scope="module")
def shelf(pristine, tmp_path_factory):
    """A folder with a pipeline of each family, and an adapter for each."""
    root = tmp_path_factory.mktemp("shelf")
    for name, pipe in pristine.items():
        pipe.save_pretrained(root / name)
        net = fresh(pipe).transformer
        student.build(net, modes=2, rank=2, generator=draws())
        save_adapter(net, root / f"{name}-adapter", info=AdapterInfo(steps=4, also_steps=(2,)))
    return root


def subject(shelf, name="flux", **more) -> ModelAndAdapter:
    return ModelAndAdapter(**{"model": str(shelf / name), "adapter": str(shelf / f"{name}-adapter"), **more})


@pytest.mark.parametrize("name", PIPELINES)
def test_the_folder_tells_family_size_and_memory_as_the_pipeline_does(name, shelf, pristine) -> None:
    pipe = pristine[name]
    setup = settle(subject(shelf, name), SIZE, CPU)
    assert (setup.family.name, setup.token) == (name, 2 * pipe.vae_scale_factor)
    parts = fit.weighed(shelf / name, setup.family, "bfloat16")
    assert parts.transformer * 1e9 == 2 * sum(p.numel() for p in pipe.transformer.parameters())
    assert parts.vae * 1e9 == pytest.approx(2 * sum(p.numel() for p in pipe.vae.parameters()), rel=0.05)
    assert parts.text > 0 and parts.step == memory.MODELS[name].step
    with pytest.raises(ValueError, match=f"height = {setup.token + 1}: expected a multiple of {setup.token}"):
        settle(subject(shelf, name), Drawing(height=setup.token + 1, width=setup.token), CPU)


def test_steps_are_the_adapters_and_fifty_for_the_teacher(shelf) -> None:
    assert settle(subject(shelf), SIZE, CPU).steps == 4
    assert settle(subject(shelf, adapter="none"), SIZE, CPU).steps == 50
    assert settle(subject(shelf), dataclasses.replace(SIZE, steps=3), CPU).steps == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps = 0: expected 1 to 1000"),
        ({"guidance": math.nan}, "--guidance = nan"),
        ({"true_cfg": -1.0}, "--true-cfg = -1.0"),
        ({"negative_prompt": "red", "true_cfg": 1.0}, "a negative prompt at scale 1 changes nothing"),
        ({"batch": 0}, "batch = 0"),
        ({"fuse": True, "no_fuse": True}, "expected one of them"),
        ({"fit": "offload"}, "--fit offload is for GPUs, and the device is cpu: take --fit card or int8"),
        ({"fit": "nf4"}, "--fit nf4 is for GPUs"),
        ({"fit": "group"}, "--fit group is for GPUs"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_looked_at(changes, said) -> None:
    """There is no such model."""
    own = {one.name for one in dataclasses.fields(Drawing)}
    drawing = Drawing(**{name: value for name, value in changes.items() if name in own})
    machine = Machine(device="cpu", **{name: value for name, value in changes.items() if name not in own})
    nowhere = (
        ModelAndAdapter(model="world", adapter="none")
        if "negative_prompt" in changes
        else ModelAndAdapter(model="no/where")
    )
    with pytest.raises(ValueError, match=said):
        settle(nowhere, drawing, machine)


def test_an_adapter_of_another_family_is_refused_without_loading_the_base(shelf) -> None:
    with pytest.raises(ValueError, match="an adapter for the family 'qwen_image', and .* is of 'flux'"):
        settle(ModelAndAdapter(model=str(shelf / "flux"), adapter=str(shelf / "qwen_image-adapter")), SIZE, CPU)


def test_a_lora_that_a_record_names_is_fetched_only_if_the_user_names_it(shelf, tmp_path) -> None:
    folder = shutil.copytree(shelf / "flux-adapter", tmp_path / "adapter")
    record = json.loads((folder / "arcflow.json").read_text())
    (folder / "arcflow.json").write_text(json.dumps({**record, "teacher_lora": "somebody/elses"}))
    with pytest.raises(
        ValueError, match="with the LoRA 'somebody/elses' .*expected --teacher-lora somebody/elses .*none"
    ):
        settle(subject(shelf, adapter=str(folder)), SIZE, CPU)
    assert settle(subject(shelf, adapter=str(folder), teacher_lora="none"), SIZE, CPU).lora is None
    assert settle(subject(shelf, adapter=str(folder), teacher_lora="mine"), SIZE, CPU).lora == "mine"


def test_digests_know_weights_and_not_names(shelf, tmp_path) -> None:
    """A retrained adapter or base in the same place is another one; a copy elsewhere is the same."""

    def digests(model, adapter):
        setup = settle(ModelAndAdapter(model=str(model), adapter=str(adapter)), SIZE, CPU)
        return setup.model_weights, setup.adapter_weights

    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(shelf / "flux", model)
    shutil.copytree(shelf / "flux-adapter", adapter)
    first = digests(model, adapter)
    assert first == digests(shelf / "flux", shelf / "flux-adapter")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    record = json.loads((adapter / "arcflow.json").read_text())
    del record["sha256"]
    (adapter / "arcflow.json").write_text(json.dumps({**record, "shift": 2.0}))
    assert all(one != other for one, other in zip(first, digests(model, adapter), strict=True))
    (adapter / "arcflow.json").write_text(json.dumps({**record, "base": "renamed"}))
    weights.write_bytes(content)
    assert digests(model, adapter) == first


def test_files_in_the_hubs_cache_are_known_by_their_names(tmp_path) -> None:
    from arcflow.system import hub

    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert hub.content_of(tmp_path / "model.safetensors") == "ab" * 32
    (tmp_path / "plain.safetensors").write_bytes(b"read")
    assert hub.content_of(tmp_path / "plain.safetensors") == hub.digest(tmp_path / "plain.safetensors")


def test_an_opened_student_draws_what_attach_draws(shelf, pristine) -> None:
    setup = settle(subject(shelf, "qwen_image"), SIZE, CPU)
    assert setup.fit == "card" and setup.fused
    opened = setup.open()
    opened.prompt_template_encode, opened.prompt_template_encode_start_idx = "on {}", 1
    pipe = attach(fresh(pristine["qwen_image"]), setup.adapter, fuse=True)
    one, other = (drawn(made).latents for made in (opened, pipe))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # weights that are mapped from a file round otherwise
    plain = settle(subject(shelf), SIZE, Machine(device="cpu", no_fuse=True))
    assert not plain.fused and not settle(subject(shelf, adapter="none"), SIZE, CPU).fused


@pytest.mark.parametrize("card", memory.CARDS)
@pytest.mark.parametrize("name", memory.MODELS)
def test_auto_does_what_the_doctor_advises(name, card) -> None:
    advised = memory.best(memory.MODELS[name], card)
    assert advised and fit.fastest(memory.MODELS[name], card) == advised.fit
    assert fit.fastest(memory.MODELS[name], card, short=True) not in fit.SHORT


def test_a_card_that_is_too_small_is_told_so_and_a_cpu_takes_the_model_as_it_is() -> None:
    with pytest.raises(ValueError, match="the card has 2.0 GB, and the smallest way takes .* GB"):
        fit.fastest(memory.MODELS["flux"], 2.0)
    cpu = torch.device("cpu")
    assert fit.choose("auto", cpu, memory.MODELS["flux2"]) == "card" and fit.room_to_fuse(memory.MODELS["flux2"], cpu)


def test_fewer_bits_are_asked_of_the_loader(shelf) -> None:
    model = open.config.Model(base="world", dtype="bfloat16")
    assert fit.shortened(model, "offload", torch.device("cuda")) == model
    short = fit.shortened(model, "nf4", torch.device("cuda"))
    assert (short.quantize, short.text_bits, short.dtype) == ("nf4", 4, "bfloat16")
    assert fit.shortened(model, "int8", torch.device("cpu")).text_bits is None


def test_a_quantized_base_is_not_quantized_again_nor_fused(shelf, tmp_path) -> None:
    folder = shutil.copytree(shelf / "flux", tmp_path / "short")
    config = folder / "transformer" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}})
    )
    own = {"model": str(folder)}
    with pytest.raises(ValueError, match="--fuse makes plain copies of weights that are quantized"):
        settle(subject(shelf, **own), SIZE, Machine(device="cpu", fuse=True))
    assert not settle(subject(shelf, **own), SIZE, CPU).fused


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_negative_prompt_guides_by_a_second_call_on_student_and_teacher(name, pristine, shelf) -> None:
    pipe = fresh(pristine[name])
    attach(pipe, shelf / f"{name}-adapter", guidance=True)
    alone, against = drawn(pipe), drawn(pipe, negative="blue")
    same = drawn(pipe, negative="blue", true_cfg=4.0)
    assert (alone.nfe, against.nfe) == (2, 4)
    assert torch.equal(against.latents, same.latents) and not torch.equal(against.latents, alone.latents)


@pytest.mark.slow
def test_klein_is_guided_once_unless_a_second_call_is_asked_for(pristine) -> None:
    """The record's own guidance, that of the family, is the teacher's second call, which the student has learned."""
    pipe: Flux2KleinPipeline = klein_pipeline(pristine["flux2"], flux2_transformer(guidance_embeds=False))
    student.build(pipe.transformer, modes=2, rank=2, generator=draws())
    assert generate._arguments(pipe, 1, generate.Guide(4.0))["guidance_scale"] == 1.0
    assert generate._arguments(pipe, 1, generate.Guide(true_cfg=3.0))["guidance_scale"] == 3.0
    student.remove(pipe.transformer)
    assert generate._arguments(pipe, 1, generate.Guide())["guidance_scale"] == 4.0


@pytest.mark.parametrize("name", PIPELINES)
def test_guidance_means_what_the_model_calls_so(name, shelf) -> None:
    """Embedded where there is such an input, else the scale of the second call; on a student that is asked for."""
    given = settle(subject(shelf, name), dataclasses.replace(SIZE, guidance=2.0), CPU)
    usual = settle(subject(shelf, name), SIZE, CPU)
    family = next(family for family in FAMILIES if family.name == name)
    assert (usual.guidance, usual.true_cfg) == (family.guidance, None)
    assert (given.guidance, given.true_cfg) == ((None, 2.0) if family.guidance is None else (2.0, None))
    assert given.guided_twice == (family.guidance is None)
    if name == "flux2":
        with pytest.raises(ValueError, match="--negative-prompt: the pipelines of flux2 take none"):
            settle(subject(shelf, name), dataclasses.replace(SIZE, negative_prompt="blue"), CPU)
        with pytest.raises(ValueError, match="guides by no second call; give --guidance"):
            settle(subject(shelf, name), dataclasses.replace(SIZE, true_cfg=2.0), CPU)
