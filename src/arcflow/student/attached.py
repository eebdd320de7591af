"""A student is put on its network, and taken off again, bit for bit.

`put_on` and `take_off` connect and disconnect what a `State` holds and do nothing else: the base's modules stay where
they are, and the same student can be put on again.
"""

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import nn

from arcflow.student.hooks import beside_lora, connect, disconnect, join, separate, watch, widened
from arcflow.student.places import base_linear, block_of, extras_of, norm_of, put_at
from arcflow.student.state import State, refuse_to_save, state_of, trained_modules


def put_on(transformer: nn.Module, state: State) -> None:
    """Connect a student: its transformer is one now. Nothing of the base is changed."""
    state.trainable_before = [p for p in transformer.parameters() if p.requires_grad]
    state.training_before = transformer.training
    with separate(transformer):
        transformer.requires_grad_(False)
        for name, twin in state.twins.items():
            transformer.set_submodule(name, twin)
        for name, low in state.lows.items():
            connect(base_linear(transformer, name), low)
            extras = extras_of(transformer, name)
            extras.add_module(f"{len(extras._modules)}-lora", low)  # no Linear's name: who looks for one finds it alone
        for linear in beside_lora(transformer, state):
            connect(linear)
        for name, tuned in state.tuned.items():
            put_at(transformer, name, tuned)
    names = [name.rpartition(".")[0] for name in state.lows]
    around = (transformer.get_submodule(name) for name in dict.fromkeys(names))
    state.attentions = [module for module in around if hasattr(module, "fuse_projections")]
    state.places = []
    transformer._arcflow = state  # type: ignore[assignment]
    transformer.register_forward_pre_hook(watch, with_kwargs=True)
    norm = norm_of(transformer, state.family)
    if norm is not None:
        norm.register_forward_pre_hook(widened, with_kwargs=True)
    transformer.save_pretrained = refuse_to_save  # type: ignore[assignment]
    join(transformer)
    for part in trained_modules(state):
        for parameter in part.parameters():
            parameter.requires_grad_(True)
        part.train(transformer.training)
    refresh(transformer)


def take_off(transformer: nn.Module) -> State:
    """Disconnect the student: the untouched base again. The student is whole, and can be put on again."""
    state = state_of(transformer)
    with separate(transformer):
        for module in transformer.modules():
            disconnect(module)
        for name in state.tuned:
            put_at(transformer, name, state.tuned[name].frozen)
        for name, twin in state.twins.items():
            transformer.set_submodule(name, twin.frozen)
    for name in state.lows:
        block = transformer.get_submodule(block_of(transformer, name))
        block._modules.pop("student", None)
    for module, hook in ((transformer, watch), (norm_of(transformer, state.family), widened)):
        if module is None:
            continue
        for key in [key for key, known in module._forward_pre_hooks.items() if known is hook]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for parameter in state.trainable_before:
        if not parameter.is_inference():  # of a base that was made in inference mode, outside of which none may learn
            parameter.requires_grad_(True)
    del transformer._arcflow, transformer.save_pretrained
    transformer.train(state.training_before)
    refresh(transformer)
    return state


def refresh(transformer: nn.Module) -> None:
    """What was made of the modules as they were is made again: compiled blocks do not notice hooks that come or go, and
    group offloading brings the weights to a call that it knew when it was switched on."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in transformer.modules()):
        torch.compiler.reset()
    _maybe_remove_and_reapply_group_offloading(transformer)
