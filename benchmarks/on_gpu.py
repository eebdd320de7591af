"""FLUX.1-dev at its true shape on a GPU: what sampling and training take there, beside what was computed without one.

    python -m benchmarks.on_gpu [--repeats 5]

Weights are random, which changes neither time nor memory. 1024 x 1024, batch 1, bfloat16, 512 tokens of text. Sampling
goes through the stock `FluxPipeline`: the teacher in 50 Euler steps, an untrained student of the published size in two,
saved and attached as any adapter is. Training is one micro-batch of a recipe and an optimizer step. Times are medians;
peaks are those of PyTorch's allocator, and the computed ones are given without the CUDA context.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor, nn

from arcflow import recipes, student
from arcflow.families import memory
from arcflow.sampling import attach
from arcflow.sampling.generate import Meter, metered, stock_euler
from arcflow.student import adapter
from arcflow.system.devices import attention
from benchmarks.exact_step import seconds
from benchmarks.iteration import Loop
from benchmarks.memory import SIDE, TEXT, flux_modules
from benchmarks.training_memory import conditioning, tokens, use

Modules = tuple[Any, list[nn.Module], Any]


def build(modules: Callable[[], Modules], device: str) -> Any:
    """The stock pipeline, without tokenizers."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer, (t5, clip), vae = modules()
    finally:
        torch.set_default_dtype(kept)
    names = {"text_encoder": clip, "text_encoder_2": t5, "tokenizer": None, "tokenizer_2": None}
    parts = {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(), **names}
    for module in (transformer, t5, clip, vae):
        module.eval().requires_grad_(False)
    pipe: Any = FluxPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Sampling:
    """Images of one pipeline, their time by part and the memory they take."""

    def __init__(self, pipe: Any, repeats: int, side: int = SIDE) -> None:
        self.pipe, self.repeats, self.side = pipe, repeats, side

    @torch.no_grad()
    def encode(self) -> tuple[Tensor, Tensor]:
        """What the text encoders make of random words."""
        clip, t5 = self.pipe.text_encoder, self.pipe.text_encoder_2
        short, long = (
            torch.randint(2, net.config.vocab_size, (1, length), device=net.device)
            for net, length in ((clip, clip.config.max_position_embeddings), (t5, TEXT))
        )
        return t5(long)[0], clip(short).pooler_output

    def draw(self, text: tuple[Tensor, Tensor], steps: int) -> Meter:
        with metered(self.pipe) as meter:
            self.pipe(
                prompt_embeds=text[0],
                pooled_prompt_embeds=text[1],
                num_inference_steps=steps,
                guidance_scale=3.5,
                height=self.side,
                width=self.side,
                output_type="pt",
            )
        return meter

    def medians(self, text: tuple[Tensor, Tensor], steps: int) -> dict[str, float]:
        """Milliseconds of each part, the text encoders aside."""
        meters = [self.draw(text, steps) for _ in range(self.repeats + 1)][1:]  # one to warm up
        return {part: 1e3 * statistics.median(m.seconds[part] for m in meters) for part in ("transformer", "vae")}

    def encoding(self) -> float:
        """Milliseconds of the text encoders."""
        return 1e3 * median(self.encode, self.repeats)


def median(call: Callable[[], object], repeats: int) -> float:
    """Seconds of a call; one more to warm up."""
    return statistics.median([seconds(call) for _ in range(repeats + 1)][1:])


def peak(call: Callable[[], Any]) -> float:
    """GB of the allocator while a call runs."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 1e9


def sampling(pipe: Any, repeats: int) -> None:
    """Print what two steps take against fifty."""
    here, ways = Sampling(pipe, repeats), dict((way.name, way.gigabytes) for way in memory.ways(memory.MODELS["flux"]))
    text = here.encode()
    encoding = here.encoding()
    with stock_euler(pipe):
        fifty = here.medians(text, 50)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_adapter(student.build(pipe.transformer, modes=16, rank=256), folder)
        student.remove(pipe.transformer)
        two, peaks = {}, {}
        for name, fuse in (("LoRA beside the weights", False), ("LoRA fused", True)):
            attach.attach(pipe, folder, fuse=fuse)
            two[name] = here.medians(text, 2)
            peaks[name] = peak(lambda: here.draw(here.encode(), 2))
            attach.detach(pipe)
    print("| sampling | transformer | one call | text encoders | autoencoder | in all | times less |")
    print("|---|---|---|---|---|---|---|")
    whole = {"teacher, 50 steps": (50, fifty), **{f"student, 2 steps, {name}": (2, took) for name, took in two.items()}}
    slow = fifty["transformer"] + fifty["vae"] + encoding
    for name, (calls, took) in whole.items():
        total = took["transformer"] + took["vae"] + encoding
        cells = [took["transformer"], took["transformer"] / calls, encoding, took["vae"], total]
        times = f"{fifty['transformer'] / took['transformer']:.1f} (transformer), {slow / total:.1f} (in all)"
        print(f"| {name} | " + " | ".join(f"{cell:.0f} ms" for cell in cells) + f" | {times} |", flush=True)
    print("\n| memory to sample, GB | computed | measured |\n|---|---|---|")
    way = "everything on the card"
    print(f"| {way} | {ways[way] - memory.CONTEXT:.1f} | {peaks['LoRA beside the weights']:.1f} |", flush=True)
    print(f"| {way}, LoRA fused | | {peaks['LoRA fused']:.1f} |", flush=True)


def training(net: Any, names: list[str], repeats: int) -> None:
    """Print what a micro-batch takes, recipe by recipe."""
    print(
        "\n| training | micro-batch | GB, computed | measured | s a sample, teacher leads | on the student's own path |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        run = recipes.RECIPES[name]()
        batch = run.optim.micro_batch or run.optim.batch
        cond = conditioning(run, batch, lambda *shape: torch.randn(shape, device="cuda").bfloat16())
        here = Loop(net, run, torch.randn(batch, tokens(run), 64, device="cuda"), cond)
        leads, alone = 0, run.distill.hold + run.distill.decay  # iterations with the teacher's share at 1 and at 0
        here.ours(leads)
        measured = peak(partial(here.ours, alone))
        led, own = (median(partial(here.gradients, step), repeats) / batch for step in (leads, alone))
        computed = use(run)[0].total - memory.CONTEXT
        print(f"| {name} | {batch} | {computed:.1f} | {measured:.1f} | {led:.2f} | {own:.2f} |", flush=True)
        del here
        student.remove(net)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipes", nargs="*", default=["flux-published", "flux-48gb", "flux"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is there; python -m benchmarks.memory and training_memory compute without one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    pipe = build(flux_modules, "cuda")
    sampling(pipe, options.repeats)
    net = pipe.transformer
    del pipe
    with attention(torch.device("cuda")):
        training(net, options.recipes, max(1, options.repeats // 2))


if __name__ == "__main__":
    main()
