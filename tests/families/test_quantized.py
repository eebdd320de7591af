"""A student on a base whose weights are stored in 8 or 4 bits: head and norm stay float32."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import arcflow
from arcflow import student
from arcflow.config import Model, Optim
from arcflow.families import memory, network, weights
from arcflow.families.loading import load_pipe
from arcflow.runs.checkpoint import Checkpoints, Progress
from arcflow.runs.ema import Ema
from arcflow.student import adapter, views
from arcflow.system import files
from arcflow.training.loop import train
from arcflow.training.optimizer import adamw
from benchmarks import quantized
from tests.support.pipelines import flux_transformer, perturb
from tests.support.trainings import config, quiet, tiny_pipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),
]


ERROR = {
    "torchao int8": 0.05,
    "torchao float8": 0.1,
    "bitsandbytes int8": 0.05,
    "bitsandbytes nf4": 0.3,
    "gguf Q8_0": 0.05,
    "gguf Q4_0": 0.3,
    "quanto int8": 0.05,
}
"""What the network itself may lose, relative, with random weights."""


@pytest.fixture(params=ERROR)
def way(request):
    """How the base is kept, if the library is here."""
    library = request.param.split()[0]
    pytest.importorskip({"quanto": "optimum.quanto"}.get(library, library))
    return request.param


@pytest.fixture
def plain():
    """A transformer wide enough for blocks of 64 weights, and loud enough for the blocks to matter."""
    torch.manual_seed(0)
    net = flux_transformer(attention_head_dim=32, axes_dims_rope=(8, 12, 12), joint_attention_dim=64, in_channels=64)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return net


@pytest.fixture
def call():
    torch.manual_seed(1)
    cond = {
        "encoder_hidden_states": torch.randn(2, 8, 64),
        "pooled_projections": torch.randn(2, 32),
        "txt_ids": torch.zeros(8, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "guidance": torch.full((2,), 3.5),
    }
    x = torch.randn(2, 16, 64)

    @torch.no_grad()
    def velocity(net):
        return network.call(net, x, 0.7, cond)

    velocity.teacher = lambda net: views.teacher_velocity(net, x, 0.7, cond)
    return velocity


def distance(one, other):
    return float((one - other).norm() / other.norm())


def test_an_adapter_goes_on_a_quantized_base(plain, call, way, tmp_path):
    made = student.build(copy.deepcopy(plain), modes=4, rank=2).eval()
    perturb(made)
    adapter.save_adapter(made, tmp_path)
    base = quantized.stored(plain, quantized.STORES[way])
    before = call(base)
    lost = distance(before, call(plain))
    assert 0 < lost < ERROR[way]

    adapter.load_adapter(base, tmp_path)
    assert {p.dtype for p in base.proj_out.tuned.parameters()} == {torch.float32}
    assert distance(call(base), call(made)) < 2 * lost
    assert torch.equal(call.teacher(base), before)
    with pytest.raises(ValueError, match="cannot fuse: the base is quantized"):
        student.fuse(base)
    student.remove(base)
    assert torch.equal(call(base), before)


@pytest.mark.parametrize("way", ["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"], indirect=True)
def test_a_style_lies_beside_a_student_on_a_quantized_base(plain, call, way, tmp_path):
    """In both orders, and either goes first; to fuse is refused, and nothing changes."""
    made = student.build(copy.deepcopy(plain), modes=4, rank=2).eval()
    perturb(made)
    adapter.save_adapter(made, tmp_path)
    base = quantized.stored(plain, quantized.STORES[way])

    def style():
        torch.manual_seed(3)
        base.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "ff.net.2"]), "style")
        base.eval()

    before = call(base)
    style()
    styled = call(base)
    adapter.load_adapter(base, tmp_path)
    both = call(base)
    with pytest.raises(ValueError, match="cannot fuse: the base is quantized"):
        student.fuse(base)
    assert torch.equal(call(base), both) and torch.equal(call.teacher(base), styled)
    student.remove(base)
    assert torch.equal(call(base), styled) and not torch.equal(styled, before)
    base.delete_adapters("style")
    adapter.load_adapter(base, tmp_path)
    alone = call(base)
    style()
    torch.testing.assert_close(call(base), both, rtol=1e-4, atol=1e-4)
    base.delete_adapters("style")
    assert torch.equal(call(base), alone) and not torch.equal(alone, both)


def test_a_new_student_starts_as_its_quantized_teacher(plain, call, way):
    net = quantized.stored(plain, quantized.STORES[way])
    before = call(net)
    student.build(net, modes=1, rank=2).eval()
    assert distance(call(net)[..., :64], before) < 0.1  # but for the constant that tells modes apart


@pytest.mark.parametrize(("name", "planned"), [("torchao int8", memory.INT8), ("bitsandbytes nf4", memory.NF4)])
def test_a_card_is_planned_with_the_size_that_weights_have(name, planned):
    pytest.importorskip(name.split()[0])
    layer = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False)).bfloat16()
    short = quantized.stored(layer, quantized.STORES[name])
    assert quantized.weight_bytes(short) / quantized.weight_bytes(layer) == pytest.approx(planned, abs=0.01)


def test_layerwise_casting_computes_in_the_dtype_it_says(plain, call, tmp_path):
    made = student.build(copy.deepcopy(plain), modes=4, rank=2).eval()
    adapter.save_adapter(made, tmp_path)
    wanted = call(made)
    plain.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert weights.compute_dtype(plain) == torch.float32
    lost = distance(call(plain), call.teacher(made))
    adapter.load_adapter(plain, tmp_path)
    assert 0 < lost < 0.1 and distance(call(plain), wanted) < 2 * lost


@pytest.mark.parametrize("way", ["torchao int8", "torchao float8", "bitsandbytes nf4"], indirect=True)
def test_a_student_learns_on_a_quantized_base(way, tmp_path):
    """Through the loader that a run has; nf4, which that makes on a GPU alone, is put in by hand."""
    quantize = {"torchao int8": "int8", "torchao float8": "fp8", "bitsandbytes nf4": "nf4"}[way]
    tiny_pipe().save_pretrained(tmp_path / "base")
    run = config(tmp_path / "run", model__base=str(tmp_path / "base"), model__quantize=quantize, pictures=0)
    if quantize == "nf4":
        pipe = tiny_pipe()
        pipe.transformer = quantized.stored(pipe.transformer, quantized.STORES[way])
    else:
        pipe = load_pipe(run.model)
    net = pipe.transformer
    x, cond = network.noise(pipe, [1], 8, 8), network.encode_prompts(pipe, ["a red ring"], height=8, width=8)
    with torch.no_grad():
        before = network.call(net, x, 0.7, cond)
    folder = train(run, pipe, quiet)

    lines = files.read_lines(folder / "log.jsonl")
    distances = [line["distance"] for line in lines if "distance" in line]
    assert distances[-1] < distances[0] and not any(line.get("skipped") for line in lines)
    trained = student.trainable(net)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(views.teacher_velocity(net, x, 0.7, cond), before)
    (file,) = sorted((folder / "checkpoints").iterdir())[-1].glob("*.safetensors")
    averaged = {name.removeprefix("ema.") for name in load_file(file) if name.startswith("ema.")}
    assert averaged == trained.keys()

    plain = tiny_pipe()
    arcflow.attach(plain, folder / "adapter")
    with torch.no_grad():
        here, there = (student.predict(p.transformer, x, 1.0, cond).velocity(0.0) for p in (pipe, plain))
    assert distance(there, here) < ERROR[way]


@pytest.mark.parametrize("bits", [8, 4])
def test_text_encoders_may_be_stored_short(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_pipe().save_pretrained(tmp_path / "base")
    changes = {"model__base": str(tmp_path / "base"), "model__text_bits": bits, "data__cache": False, "pictures": 0}
    run = config(tmp_path / "run", optim__iterations=1, **changes)
    pipe = load_pipe(run.model)
    short, plain = quantized.weight_bytes(pipe.text_encoder_2), quantized.weight_bytes(tiny_pipe().text_encoder_2)
    assert short < plain and not weights.quantized(pipe.transformer.x_embedder)
    (line,) = [line for line in files.read_lines(train(run, pipe, quiet) / "log.jsonl") if "loss" in line]
    (exact,) = [
        line
        for line in files.read_lines(
            train(config(tmp_path / "plain", optim__iterations=1), tiny_pipe(), quiet) / "log.jsonl"
        )
        if "loss" in line
    ]
    assert line["loss"] == pytest.approx(exact["loss"], rel=0.05)


def test_four_bits_without_a_gpu_are_refused_in_words(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'nf4'.* expected a GPU, .*; take int8"):
        load_pipe(Model(quantize="nf4"))


def test_moments_in_eight_bits_go_on_from_a_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")

    def run(steps, restored):
        draw = torch.Generator().manual_seed(0)
        parameters = {"head_loggamma.weight": torch.nn.Parameter(torch.randn(9, 5, generator=draw))}
        parameters["lora_A.weight"] = torch.nn.Parameter(torch.randn(100, 100, generator=draw))
        ema, optimizer = Ema(parameters), adamw(parameters, Optim(bits=8, lr=1e-2))
        checkpoints = Checkpoints(tmp_path, parameters, ema, optimizer)
        first = checkpoints.restore().step if restored else 0
        for step in range(first, steps):
            for p in parameters.values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        checkpoints.save(Progress(step=steps))
        checkpoints.close()
        moments = optimizer.state[parameters["lora_A.weight"]]
        assert moments["state1"].dtype == torch.uint8
        return [*parameters.values(), moments["state1"], moments["state2"]]

    run(3, restored=False)
    taken_up, whole = run(6, restored=True), run(6, restored=False)
    assert all(torch.equal(one, other) for one, other in zip(taken_up, whole, strict=True))
