"""Memory of a training iteration at the size of its recipe, computed without weights, recipe by recipe.

    python -m benchmarks.training_memory [--recipes flux-24gb ...]

The transformer is built at its true shape on the meta device, one micro-batch goes through the objective and its
backward passes, on the student's own path, where the teacher is asked for the most at a time; a dispatch mode counts
the bytes of every tensor alive. Attention is counted as fused kernels have it. Beside that stand the frozen base, the
trained weights, their average and AdamW's moments. The last column is the same iteration with the graphs of both
segments kept for one backward pass, as the paper's authors do.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from arcflow import config, recipes, student
from arcflow.distillation.objective import distill
from arcflow.families.memory import CONTEXT, NF4
from arcflow.system.processes import Ranks
from arcflow.training.learner import build_student, views
from benchmarks.memory import TEXT, Alive, tensor

RECIPES = {name: make for name, make in recipes.RECIPES.items() if not name.startswith("world")}


class FusedAttention(torch.autograd.Function):
    """Shape and memory of a fused kernel: its inputs and its output are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def attention(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
    return FusedAttention.apply(query, key, value)


@dataclass(frozen=True)
class Use:
    """GB of a training iteration on one card."""

    base: float
    trained: float
    average: float
    moments: float
    iteration: float
    """Activations and gradients at their peak."""

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self)) + CONTEXT


def conditioning(run: config.Run, batch: int, tensor: Callable[..., Tensor] = tensor) -> dict[str, Tensor]:
    if run.model.base.startswith("Qwen"):
        return {
            "encoder_hidden_states": tensor(batch, TEXT, 3584),
            "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.bool),
            "img_shapes": torch.tensor([[[1, run.data.height // 16, run.data.width // 16]]] * batch),
        }
    return {
        "encoder_hidden_states": tensor(batch, TEXT, 4096),
        "pooled_projections": tensor(batch, 768),
        "guidance": tensor(batch).float(),
        "img_ids": tensor(tokens(run), 3),
        "txt_ids": tensor(TEXT, 3),
    }


def tokens(run: config.Run) -> int:
    """Tokens of an image of the recipe's size."""
    return run.data.height * run.data.width // 256


def build(run: config.Run) -> Any:
    """The student of a recipe, on the meta device."""
    with torch.device("meta"):
        if run.model.base.startswith("Qwen"):
            net: Any = QwenImageTransformer2DModel()
        else:
            net = FluxTransformer2DModel(guidance_embeds=True)
    net = net.to(torch.bfloat16)
    build_student(net, run, Ranks())
    return net.train()


def iteration(net: Any, run: config.Run, *, one_backward: bool = False) -> float:
    """GB at the peak of one micro-batch: activations and gradients."""
    batch = run.optim.micro_batch or run.optim.batch
    x, cond = tensor(batch, tokens(run), 64).float(), conditioning(run, batch)
    negative = conditioning(run, 1) if run.distill.teacher_cfg > 1 else None
    walker, teacher = views(net, negative, run.distill.teacher_cfg)
    draws = [torch.Generator().manual_seed(i) for i in range(batch)]
    kept, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        with Alive(net) as alive:
            parts = distill(walker, teacher, x, cond, config=run.distill, ratio=0.0, generator=draws, average=walker)
            if one_backward:
                torch.stack([part.loss for part in parts]).sum().backward()
            else:
                for part in parts:
                    part.loss.backward()
                    del part
    finally:
        F.scaled_dot_product_attention = kept
    net.zero_grad()
    return alive.peak / 1e9


def use(run: config.Run) -> tuple[Use, float]:
    """Of a recipe, and the peak of the iteration the authors' way. A path in coefficients computes with its times,
    which tensors without data do not have: exponentials of as many modes stand in for it."""
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, form="mixture"))
    net = build(run)
    trained = sum(p.numel() for p in student.trainable(net).values()) / 1e9
    ours = {id(p) for p in student.trainable(net).values()}
    base = sum(p.numel() for p in net.parameters() if id(p) not in ours) / 1e9
    short = NF4 if run.model.quantize == "nf4" else 1.0
    dequantized = largest(net) if short < 1 else 0.0
    moments = {32: 8.0, 8: 2.0}[run.optim.bits]
    mine = Use(2 * base * short, 4 * trained, 4 * trained, moments * trained, iteration(net, run) + dequantized)
    return mine, iteration(net, run, one_backward=True) + dequantized


def largest(net: nn.Module) -> float:
    """GB of the largest weight in bfloat16: a quantized one is unpacked for its product."""
    return max(2 * p.numel() for p in net.parameters()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    names = [field.name for field in dataclasses.fields(Use)]
    print("| GB | " + " | ".join(names) + " | total | one backward |")
    print("|---" * (len(names) + 3) + "|")
    for name in parser.parse_args().recipes:
        mine, theirs = use(RECIPES[name]())
        numbers = [*dataclasses.astuple(mine), mine.total, mine.total - mine.iteration + theirs]
        print(f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
