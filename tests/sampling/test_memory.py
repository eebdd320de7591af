"""What a student takes of the memory: what it adds, and no second copy of anything else."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arcflow
from arcflow import student
from arcflow.student import adapter
from arcflow.student.places import base_linear
from arcflow.student.state import lora_layers
from tests.support.pipelines import flux_transformer, perturb


class Watched(TorchDispatchMode):
    """Bytes of the tensors that were made while the block runs: those that are left, and the most at once."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.left = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.left += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.left)
        return made

    def gone(self, key, size):
        self.known.discard(key)
        self.left -= size


def size(parameters):
    return sum(p.numel() * p.element_size() for p in parameters)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "fuse"), [("mixture", False), ("mixture", True), ("coefficients", False)])
def test_attach_takes_what_it_adds(flux, tmp_path, form, fuse):
    """At most twice that on the way, for what is read from the file; fused the merged weights too, one at a time."""
    flux.transformer = flux_transformer(
        num_layers=3, num_single_layers=3, attention_head_dim=32, axes_dims_rope=(8, 12, 12)
    )
    net = student.build(copy.deepcopy(flux.transformer), modes=4, rank=2, targets="all", form=form)
    perturb(net)
    folder, base = adapter.save_adapter(net, tmp_path), size(flux.transformer.parameters())
    del net
    with Watched(*flux.transformer.parameters()) as watched:
        arcflow.attach(flux, folder, fuse=fuse)
    added = size(student.trainable(flux.transformer).values())
    merged = [base_linear(flux.transformer, name).weight for name in lora_layers(flux.transformer)]
    own = size(merged) if fuse else 0
    assert added < base / 4, "of a small share of the base something can be said"
    assert added + own <= watched.left + 4096 and watched.left < 1.2 * added + own + 4096
    assert watched.peak < 2.2 * added + own + (3 * max(map(size, ([w] for w in merged))) if fuse else 0)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
def test_nothing_of_a_student_stays_when_it_has_gone(flux, tmp_path, fuse):
    """However often one comes and goes."""
    made = student.build(copy.deepcopy(flux.transformer), modes=4, rank=2)
    folder, left = adapter.save_adapter(made, tmp_path), []
    for _ in range(3):
        arcflow.attach(flux, folder, fuse=fuse)
        flux("a red cube", num_inference_steps=2, height=16, width=16, output_type="latent")
        arcflow.detach(flux)
        gc.collect()
        left.append(sum(type(one) in (torch.Tensor, torch.nn.Parameter) for one in gc.get_objects()))
    assert left[1] == left[2]
