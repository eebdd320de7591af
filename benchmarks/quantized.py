"""What a base stored in 8 or 4 bits costs: the shipped small model in two steps, the same images from each.

    PYTHONPATH=.venv/quantized python -m benchmarks.quantized [--count 256] [--out benchmarks/results/quantized.md]

Every row is the shipped adapter on the shipped teacher, through the stock pipeline, on the same held-out prompts from
the same noise; rows differ in how the base is kept. `float32` and `bfloat16` are plain; in the others every Linear is
stored as diffusers' loader of that library stores it, from bfloat16, and computes in bfloat16. (The Linears are put in
by hand, for some of the loaders insist on a GPU.) Distances are mean squared differences of the final latents; the size
is that of the transformer alone, scales included, without the adapter.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import arcflow
from arcflow.sampling import generate
from arcflow.sampling.open import SHIPPED, adapter_of
from arcflow.student import adapter
from arcflow.system import files
from arcflow.system import packages as system_packages
from arcflow.world.check import accuracy
from arcflow.world.scene import FIRST_SEED, held_out
from arcflow.world.teacher import load_teacher

ADAPTER = adapter_of(SHIPPED, SHIPPED)
OUT = Path(__file__).parent / "results" / "quantized.md"
SIDE = 64
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIBRARIES = ("torchao", "bitsandbytes", "gguf", "optimum-quanto")


def torchao_int8(linear: nn.Linear) -> nn.Linear:
    return _torchao(linear, "Int8WeightOnlyConfig")


def torchao_float8(linear: nn.Linear) -> nn.Linear:
    return _torchao(linear, "Float8WeightOnlyConfig")


def _torchao(linear: nn.Linear, config: str) -> nn.Linear:
    quantization = import_module("torchao.quantization")
    short = copy.deepcopy(linear)
    quantization.quantize_(short, getattr(quantization, config)())
    return short


def bitsandbytes_int8(linear: nn.Linear) -> nn.Linear:
    kind = import_module("bitsandbytes").nn.Linear8bitLt
    short = kind(*_sizes(linear), has_fp16_weights=False, threshold=6.0)
    short.load_state_dict(linear.state_dict())
    return short.to("cpu")  # which is when it is stored short


def bitsandbytes_nf4(linear: nn.Linear) -> nn.Linear:
    """Blocks of 64 weights, or of 32: on a CPU, bitsandbytes takes for granted that blocks end where rows end."""
    kind = import_module("bitsandbytes").nn.Linear4bit
    dtype = linear.weight.dtype
    short = kind(*_sizes(linear), compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
    short.support_avx512bf16_for_cpu = False  # a kernel for blocks of 64 alone
    short.load_state_dict(linear.state_dict())
    short.weight.blocksize = 64 if linear.in_features % 64 == 0 else 32
    return short.to("cpu")


def gguf_q8_0(linear: nn.Linear) -> nn.Linear:
    return _gguf(linear, "Q8_0")


def gguf_q4_0(linear: nn.Linear) -> nn.Linear:
    return _gguf(linear, "Q4_0")


def _gguf(linear: nn.Linear, name: str) -> nn.Linear:
    gguf, layers = import_module("gguf"), import_module("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quants.quantize(linear.weight.detach().float().numpy(), kind)
    short = layers.GGUFLinear(*_sizes(linear), compute_dtype=linear.weight.dtype)
    short.weight, short.bias = layers.GGUFParameter(torch.from_numpy(data), quant_type=kind), linear.bias
    return short


def quanto_int8(linear: nn.Linear) -> nn.Linear:
    quanto = import_module("optimum.quanto")
    around: Any = nn.Sequential(copy.deepcopy(linear))
    quanto.quantize(around, weights=quanto.qint8)
    quanto.freeze(around)
    return around[0]


def _sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


STORES: dict[str, Callable[[nn.Linear], nn.Linear]] = {
    "torchao int8": torchao_int8,
    "torchao float8": torchao_float8,
    "bitsandbytes int8": bitsandbytes_int8,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "gguf Q8_0": gguf_q8_0,
    "gguf Q4_0": gguf_q4_0,
    "quanto int8": quanto_int8,
}
"""How a library keeps a Linear, by the library's name and its own for the way."""


def stored(net: Any, store: Callable[[nn.Linear], nn.Linear]) -> Any:
    """A copy of a network in which every Linear is stored short."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear):
            net.set_submodule(name, store(module).requires_grad_(False))
    return net.eval()


def weight_bytes(net: nn.Module) -> int:
    """What a network's weights take, scales included."""
    return sum(_bytes(tensor) for tensor in net.state_dict().values())


def _bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


@dataclass(frozen=True)
class Row:
    """One way to keep the base, and what it costs."""

    name: str
    bytes: int
    to_student: float
    to_teacher: float
    accuracy: float


def draw(pipe: Any, count: int, steps: int) -> generate.Samples:
    """The held-out prompts, each from its own noise."""
    seeds, guidance = list(range(FIRST_SEED, FIRST_SEED + count)), adapter.read_info(ADAPTER).guidance
    return generate.generate(
        pipe, held_out(count), seeds, steps=steps, height=SIDE, width=SIDE, guidance=guidance, progress=True
    )


def kept_as(pipe: Any, name: str) -> Any:
    """A copy of a pipeline whose base is kept as a row says."""
    pipe = copy.deepcopy(pipe).to(PLAIN.get(name, torch.bfloat16))
    if name in STORES:
        pipe.transformer = stored(pipe.transformer, STORES[name])
    return pipe


def apart(one: Tensor, other: Tensor) -> float:
    """Mean squared difference."""
    return float((one - other).square().mean())


def measure(count: int) -> tuple[list[Row], float]:
    """All rows, and the accuracy of the float32 teacher in 50 steps."""
    pipe, prompts = load_teacher(), held_out(count)
    with generate.stock_euler(pipe):
        teacher = draw(pipe, count, steps=50)
    rows: list[Row] = []
    student = None
    for name in (*PLAIN, *STORES):
        kept = kept_as(pipe, name)
        before = weight_bytes(kept.transformer)
        two = draw(arcflow.attach(kept, ADAPTER), count, steps=2)
        student = two.latents if student is None else student
        share = accuracy(two.images, prompts)["overall"]
        rows.append(Row(name, before, apart(two.latents, student), apart(two.latents, teacher.latents), share))
    return rows, accuracy(teacher.images, prompts)["overall"]


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| base kept as | transformer | distance to the float32 student | distance to the teacher | accuracy |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.bytes / 1e6:.2f} MB | {row.to_student:.4f} | {row.to_teacher:.4f} | {row.accuracy:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def origin(count: int, teacher: float) -> str:
    """What the numbers were made with."""
    command = " ".join(["python -m benchmarks.quantized", *sys.argv[1:]])
    about = system_packages.about()
    packages = {**about["versions"], **{name: version(name) for name in LIBRARIES}}
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    return (
        f"Two steps of the student; the teacher itself, 50 steps in float32, has {teacher:.1%}. Where rows of this "
        f"small model are no multiple of 64, nf4 has blocks of 32 weights.\n\n"
        f"Made by `{command}`, {count} prompts, on {date.today()}: {about['threads']} threads on {about['device']}, "
        f"Python {about['python']}, {versions}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    missing = [name for name in LIBRARIES if system_packages.version_of(name) == "unknown"]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not here: expected all of {LIBRARIES}; pip install 'arcflow[quantized]'"
        )
    rows, teacher = measure(options.count)
    content = f"# What a quantized base costs\n\n{table(rows)}\n\n{origin(options.count, teacher)}\n"
    files.write_text(options.out, content)
    print(content)


if __name__ == "__main__":
    main()
