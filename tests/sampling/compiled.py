"""A compiled transformer draws what the plain one does: `python compiled.py whole`, `blocks` or `uneven`."""

import copy
import sys
import tempfile

import torch

import arcflow
from arcflow import student
from arcflow.student import adapter
from tests.support.pipelines import flux_pipeline, flux_transformer, perturb, qwen_pipeline, sample


def made(pipe):
    """An adapter for this pipeline."""
    net = student.build(copy.deepcopy(pipe.transformer), modes=4, rank=2, targets="all")
    perturb(net)
    return adapter.save_adapter(net, tempfile.mkdtemp())


def same(image, wanted):
    torch.testing.assert_close(image, wanted, rtol=1e-3, atol=1e-4)


def whole():
    """Compiled before or after attach, and seen through by all that takes a transformer."""
    for first in ("attach", "compile"):
        pipe = flux_pipeline()
        two_steps, teacher = made(pipe), sample(pipe)
        arcflow.attach(pipe, two_steps)
        drawn = {steps: sample(pipe, num_inference_steps=steps) for steps in (2, 3, 4)}
        if first == "compile":
            arcflow.detach(pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", fullgraph=True)
        if first == "compile":
            same(sample(pipe), teacher)
            arcflow.attach(pipe, two_steps)
        for steps, image in drawn.items():
            same(sample(pipe, num_inference_steps=steps), image)
        adapter.save_adapter(pipe.transformer, tempfile.mkdtemp())
        arcflow.detach(pipe)
        same(sample(pipe), teacher)


def blocks():
    """Blocks of one kind share what is compiled, and notice a student that comes and goes."""
    pipe = flux_pipeline()
    pipe.transformer = flux_transformer(num_layers=3)
    two_steps, teacher = made(pipe), sample(pipe)
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    arcflow.detach(pipe)
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    same(sample(pipe), teacher)
    for fuse in (False, True):
        arcflow.attach(pipe, two_steps, fuse=fuse)
        same(sample(pipe), drawn)
    arcflow.detach(pipe)
    same(sample(pipe), teacher)
    assert not torch.allclose(drawn, teacher, atol=1e-2)


def uneven():
    """Blocks of one kind of which the last has fewer LoRA: what is compiled for one is not taken for another."""
    pipe = qwen_pipeline()
    two_steps = made(pipe)
    arcflow.attach(pipe, two_steps)
    drawn = sample(pipe)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    for _ in range(2):
        same(sample(pipe), drawn)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"whole": whole, "blocks": blocks, "uneven": uneven}[sys.argv[1]]()
