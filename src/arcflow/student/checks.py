"""Whether a network is as a student needs it, before anything is changed or called."""

from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from arcflow.student.layers import lows_of
from arcflow.student.places import base_linear, module_of, under_lora, wrapped
from arcflow.student.state import Place, State
from arcflow.system.text import few


def check_at_hand(transformer: nn.Module) -> None:
    """Whether the weights can be read: between calls, offloading to a disk leaves numbers of no meaning in their place.

    Raises:
        ValueError: they cannot.
    """
    hook = _get_top_level_group_offload_hook(transformer)
    if hook is not None and hook.config.offload_to_disk_path is not None:
        raise ValueError(
            f"weights of this transformer are on a disk ({hook.config.offload_to_disk_path}), as group offload leaves "
            f"them: attach, fuse and detach before enable_group_offload, or offload without offload_to_disk_path."
        )


def check_head_free(transformer: nn.Module, head: str) -> None:
    """A user's LoRA on the last layer adds a velocity, which a packed path has no place for."""
    layer = module_of(transformer, head)
    if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters and layer.active_adapters:
        raise ValueError(
            f"the LoRA {layer.active_adapters} sits on {head!r} and adds to a velocity, but a "
            f"whole path was asked for: expected that layer free. Switch it off (pipe.disable_lora())."
        )


def check_whole(transformer: nn.Module, state: State) -> None:
    """What was put on is still there, and nothing was merged in a place where the student has weights of its own."""
    if state.places and all(
        (transformer if around is None else around)._modules.get(name) is module
        for around, name, module in state.places
    ):
        return
    gone = [name for name, low in state.lows.items() if low not in lows_of(base_linear(transformer, name))]
    gone += [name for name, tuned in state.tuned.items() if tuned is not under_lora(module_of(transformer, name))]
    if gone:
        raise ValueError(
            f"modules of the student were replaced since it was put on: {few(gone)}. Attach the adapter again "
            f"(arcflow.attach), after what replaced them (quantization, say)."
        )
    merged = [name for name in state.tuned if getattr(module_of(transformer, name), "merged_adapters", None)]
    if merged:
        raise ValueError(
            f"a LoRA is merged into {few(merged)}, where the student has weights of its own: it would not be seen. "
            f"Call pipe.unfuse_lora() and draw with it unmerged, or merge it before arcflow.attach."
        )
    state.places = _places(transformer, state)


def _places(transformer: nn.Module, state: State) -> list[Place]:
    """Every step of the way to what the student consists of; none while a user's LoRA lies around one of its own
    Linears, which may be merged at any time."""
    if any(isinstance(module_of(transformer, name), BaseTunerLayer) for name in state.tuned):
        return []
    places: dict[tuple[int, str], Place] = {}
    for name in (*state.lows, *state.tuned):
        module = transformer
        for part in name.split("."):
            around = module
            module = module_of(module, part)
            places[id(around), part] = (None if around is transformer else around, part, module)
        while isinstance(module, BaseTunerLayer):
            around = module
            module = wrapped(module)
            places[id(around), "base_layer"] = (around, "base_layer", module)
    return list(places.values())
