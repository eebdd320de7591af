"""A student on a base whose weights are stored in 8 or 4 bits: head and norm stay float32."""

import copy

import pytest
import torch
from conftest import flux_transformer, perturb

from arcflow import adapter, backbone, student

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated"),
]


def torchao_int8(linear):
    quantization = pytest.importorskip("torchao.quantization")
    linear = copy.deepcopy(linear)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def bitsandbytes_int8(linear):
    bnb = pytest.importorskip("bitsandbytes")
    short = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, False)
    short.load_state_dict(linear.state_dict())
    return short.to("cpu")


def bitsandbytes_nf4(linear):
    bnb = pytest.importorskip("bitsandbytes")
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    short = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
    short.load_state_dict(linear.state_dict())
    return short.to("cpu")


def gguf_q8(linear):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    short = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32)
    data = gguf.quants.quantize(linear.weight.detach().numpy(), kind)
    short.weight, short.bias = GGUFParameter(torch.from_numpy(data), quant_type=kind), linear.bias
    return short


ERROR = {torchao_int8: 0.05, bitsandbytes_int8: 0.05, gguf_q8: 0.05, bitsandbytes_nf4: 0.3}
"""What the network itself may lose, relative, with random weights."""


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
        return backbone.call(net, x, 0.7, cond)

    velocity.teacher = lambda net: student.teacher_velocity(net, x, 0.7, cond)
    return velocity


def stored_short(net, quantize):
    """The same network with every Linear that fits stored short; the last layer and its norm as well."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.Linear) and module.in_features % 64 == 0 == module.out_features % 64:
            net.set_submodule(name, quantize(module).requires_grad_(False))
    return net.eval()


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("quantize", ERROR, ids=lambda f: f.__name__)
def test_an_adapter_goes_on_a_quantized_base(plain, call, quantize, tmp_path):
    made = student.build(copy.deepcopy(plain), modes=4, rank=2).eval()
    perturb(made)
    adapter.save_adapter(made, tmp_path)
    base = stored_short(plain, quantize)
    before = call(base)
    lost = distance(before, call(plain))
    assert 0 < lost < ERROR[quantize]

    adapter.load_adapter(base, tmp_path)
    assert {p.dtype for p in base.proj_out.tuned.parameters()} == {torch.float32}
    assert distance(call(base), call(made)) < 2 * lost
    assert torch.equal(call.teacher(base), before)
    with pytest.raises(ValueError, match="cannot fuse: the base is quantized"):
        student.fuse(base)
    student.remove(base)
    assert torch.equal(call(base), before)


@pytest.mark.parametrize("quantize", ERROR, ids=lambda f: f.__name__)
def test_a_new_student_starts_as_its_quantized_teacher(plain, call, quantize):
    net = stored_short(plain, quantize)
    before = call(net)
    student.build(net, modes=1, rank=2).eval()
    assert distance(call(net)[..., :64], before) < 0.1  # but for the constant that tells modes apart


def test_layerwise_casting_computes_in_the_dtype_it_says(plain, call, tmp_path):
    made = student.build(copy.deepcopy(plain), modes=4, rank=2).eval()
    adapter.save_adapter(made, tmp_path)
    wanted = call(made)
    plain.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert backbone.compute_dtype(plain) == torch.float32
    lost = distance(call(plain), call.teacher(made))
    adapter.load_adapter(plain, tmp_path)
    assert 0 < lost < 0.1 and distance(call(plain), wanted) < 2 * lost
