"""An adapter on a MODEL: a LoRA by ComfyUI's own key map, the last layer as an object patch, two wrappers.

The model that comes out is a clone. The wrapper around each call tells the last layer how far the coming step goes,
which it finds in the grid of the sampler; the wrapper around the sampler refuses those that do not take Euler steps,
and warns of grids and guidance that the adapter was not distilled for.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import comfy.lora
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from . import families
from .adapter import PREFIX, Adapter
from .layers import Bent, Head, Tuned, bent
from .portable import comfyui_name, unshift_sigma

LOGGER = logging.getLogger(__name__)

KEY = "arcflow"

NET = "diffusion_model"
"""Where a MODEL has its network."""

EULER = ("sample_euler",)
"""Samplers that take plain Euler steps ('ddim' is this one in ComfyUI)."""

Place = str | tuple[Any, ...]
"""Where a weight is: its name; or that with (axis, first row, rows), and with a function that reorders its rows."""

OFF = 0.05
"""Raw time by which a grid may miss the even one before a warning."""


def patched(model: Any, adapter: Adapter, strength: float = 1.0) -> Any:
    """A clone of the MODEL with the adapter on it.

    Raises:
        ValueError: the adapter is for another model, does not load whole, or there is one already.
    """
    places = _places(model, adapter)
    linear = _layer(places[adapter.ends.head])
    _check(model, adapter, linear)
    clone = model.clone()
    _add_lora(clone, adapter, places, strength)
    base = clone.get_model_object(linear)
    head = bent(base, adapter) if adapter.in_coefficients else Head(base, adapter)
    clone.add_object_patch(linear, head)
    if adapter.ends.norm and not adapter.in_coefficients:
        norm = _layer(places[adapter.ends.norm])
        weights = _reordered(places[adapter.ends.norm], *adapter.norm())
        clone.add_object_patch(norm, Tuned(clone.get_model_object(norm), *weights))
    clone.add_object_patch("model_sampling", _sampling(clone, adapter.shift))
    run = _Run(adapter, head)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, run.watched)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, run.told)
    clone.set_attachments(KEY, adapter)
    if adapter.teacher_lora:
        LOGGER.warning(
            "%s was distilled from its base with the LoRA %s on it: load that with 'Load LoRA', before this node.",
            *(adapter.name, adapter.teacher_lora),
        )
    return clone


def adapter_of(model: Any) -> Adapter | None:
    """The adapter on a MODEL."""
    return model.get_attachment(KEY)


def _places(model: Any, adapter: Adapter) -> dict[str, Place]:
    """Where ComfyUI has each layer that the adapter changes, by diffusers' name.

    Raises:
        ValueError: the adapter is for another model, or a layer is nowhere in this one.
    """
    own = families.of(model.model)
    if own != adapter.family:
        shown = f"for {own!r}" if own else f"ComfyUI's {type(model.model).__name__}, which none of them is for"
        raise ValueError(
            f"{adapter.name} is for {adapter.family!r}, the model is {shown}. Load the base that it was made for, or "
            f"an adapter of this model: there are {', '.join(families.FAMILIES)}."
        )
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    names = {*adapter.linears(), adapter.ends.head, adapter.ends.norm} - {""}
    found: dict[str, Place] = {}
    for name in names:
        plain = comfyui_name(name, adapter.family)
        if plain == name and f"{PREFIX}{name}" in known:
            found[name] = known[f"{PREFIX}{name}"]
        elif f"{NET}.{plain}" in known:  # as every version has all of a model's layers by ComfyUI's own names
            found[name] = known[f"{NET}.{plain}"]
    if len(found) < len(names):
        raise ValueError(
            f"{len(found)} of the {len(names)} layers of {adapter.name} found their place in this model; missing is "
            f"{min(names - set(found))!r}. Adapter and model do not belong together, or this ComfyUI names layers in "
            f"another way: update both."
        )
    return found


def _layer(place: Place) -> str:
    """Name of the layer whose weight stands there."""
    return (place if isinstance(place, str) else place[0]).removesuffix(".weight")


def _reordered(place: Place, *weights: Tensor | None) -> list[Tensor | None]:
    """Weights in the order of ComfyUI's rows."""
    change = place[2] if isinstance(place, tuple) and len(place) > 2 else None
    return [weight if weight is None or change is None else change(weight) for weight in weights]


def _check(model: Any, adapter: Adapter, name: str) -> None:
    """Whether the last layer of this name is that of the adapter's base."""
    if adapter_of(model) is not None:
        raise ValueError(f"the model has the ArcFlow adapter {adapter_of(model).name} already; apply one alone.")
    # not `model.model.diffusion_model`: clones share it, and another one may have its own layers in it now
    linear = model.get_model_object(name)
    width, features = adapter.last()
    if (linear.out_features, linear.in_features) != (width, features):
        raise ValueError(
            f"{adapter.name} was made for a last layer from {features} to {width}, the model's goes from "
            f"{linear.in_features} to {linear.out_features}. Load the base it was made for."
        )
    kept = model.backup.get(f"{name}.weight")  # while a LoRA is in the weight itself
    weight = (linear.weight if kept is None else kept.weight).detach()
    theirs = torch.tensor(adapter.fingerprint)
    plain = weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and weight.shape == (width, features)
    if plain and len(theirs):
        ours = weight.flatten()[:: max(1, weight.numel() // 64)][:64].float().cpu()
        if theirs.shape != ours.shape or (theirs - ours).norm() > 0.25 * theirs.norm():
            raise ValueError(
                f"{adapter.name} was made for another base of the same sizes: the last layers differ. Load the base it "
                f"was made for."
            )


def _add_lora(model: Any, adapter: Adapter, places: Mapping[str, Place], strength: float) -> None:
    """Every pair of the adapter's LoRA as a weight patch: one that is left out would be noise in each picture."""
    lora = {f"{PREFIX}{name}": tensor for name, tensor in adapter.lora().items()}
    patches = comfy.lora.load_lora(lora, {f"{PREFIX}{name}": places[name] for name in adapter.linears()})
    wrong = [name for name in adapter.linears() if not _fits(model, adapter, name, places[name])]
    added = model.add_patches(patches, strength * adapter.scale)
    if wrong or not len(patches) == len(added) == len(lora) // 2:
        raise ValueError(
            f"{len(added) - len(wrong)} of the {len(lora) // 2} LoRA layers of {adapter.name} fit this model. "
            f"Adapter and model do not belong together, or this ComfyUI names layers in another way: update both."
        )


def _fits(model: Any, adapter: Adapter, name: str, place: Place) -> bool:
    """Whether a LoRA is as large as its layer, or its part of one: of others ComfyUI says so in the log alone."""
    linear = model.get_model_object(_layer(place))
    rows, columns = getattr(linear, "out_features", None), getattr(linear, "in_features", None)
    if isinstance(place, tuple) and place[1] is not None:
        rows = place[1][2]
    down, up = (adapter.tensors[f"{name}.lora_{side}.weight"].shape for side in "AB")
    return rows is None or (up[0], down[1]) == (rows, columns)


def _sampling(model: Any, shift: float) -> nn.Module:
    """The model's own kind of noise levels with the adapter's shift, whatever the resolution."""
    stock = model.get_model_object("model_sampling")
    sampling = type(stock)(model.model.model_config)
    if hasattr(stock, "multiplier"):
        sampling.set_parameters(shift=shift, multiplier=stock.multiplier)
    else:  # FLUX: the exponent of the shift
        sampling.set_parameters(shift=math.log(shift))
    return sampling


class _Run:
    """What a sampler does with the model, watched."""

    def __init__(self, adapter: Adapter, head: Head | Bent) -> None:
        self.adapter, self.head = adapter, head
        self.said: set[str] = set()

    def watched(self, executor: Any, guider: Any, sigmas: Tensor, *rest: Any, **more: Any) -> Tensor:
        """The sampler's answer, if it is one that takes Euler steps."""
        self.said = set()
        sampler = executor.class_obj
        name = getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)
        churn = getattr(sampler, "extra_options", {}).get("s_churn", 0.0)
        if name not in EULER or churn:
            shown = name.removeprefix("sample_") + (f" with s_churn {churn}" if churn else "")
            raise ValueError(
                f"the sampler {shown!r} does not take the steps that {self.adapter.name} was distilled for, and would "
                f"draw noise. Choose the sampler 'euler' with the scheduler 'simple'."
            )
        self._judge(sigmas)
        cfg = getattr(guider, "cfg", 1.0)
        if self.adapter.guided and isinstance(cfg, int | float) and cfg != 1.0:
            self._say("cfg is %g, but the teacher of %s was guided already: set it to 1, for half the time", cfg)
        return executor(guider, sigmas, *rest, **more)

    def told(self, executor: Any, x: Tensor, t: Tensor, *rest: Any, **more: Any) -> Tensor:
        """The model's answer, once its last layer knows how far the step that starts at `t` goes."""
        options = more.get("transformer_options", rest[3] if len(rest) > 3 else {})
        grid = options.get("sample_sigmas")
        here = t.flatten()[0]
        places = [] if grid is None else (grid[:-1].to(here) == here).nonzero().flatten().tolist()
        if not places:
            raise ValueError(
                f"the model was called at noise level {float(here):.4g}, which is no step of its sampler's. The "
                f"adapter {self.adapter.name} needs one that calls the model at its steps alone: 'euler' with 'simple'."
            )
        self.head.tell(here.to(x.device), (here - grid[places[0] + 1].to(here)).to(x.device))
        given = more.get("guidance")
        if isinstance(given, Tensor) and self.adapter.guidance is not None:
            low, high = self.adapter.guidances or (self.adapter.guidance, self.adapter.guidance)
            near = [(value, min(max(value, low), high)) for value in given.flatten().tolist()]
            off = [(value, wanted) for value, wanted in near if abs(value - wanted) > 0.01 * wanted]
            if off:
                self._say("guidance is %g, not that of %s: add a FluxGuidance node with %g", *off[0])
        return executor(x, t, *rest, **more)

    def _judge(self, sigmas: Tensor) -> None:
        """Warn of a grid that is not the adapter's, nor the end of one with more steps."""
        grid = [float(sigma) for sigma in sigmas]
        steps = len(grid) - 1
        if steps < 1 or grid[-1] != 0:  # the first part of a grid that was cut in two
            return
        taus = [unshift_sigma(sigma, self.adapter.shift) for sigma in grid]
        length = taus[0] / (steps - 1 + self.adapter.final_step_scale)
        even = [taus[0] - i * length for i in range(steps)] + [0.0]
        if any(abs(tau - at) > OFF for tau, at in zip(taus, even, strict=True)):
            levels = ", ".join(f"{sigma:.3f}" for sigma in grid)
            self._say("the noise levels %s are not those of %s: choose the scheduler 'simple'", levels)
        if taus[0] > 1 - OFF and steps < min(self.adapter.steps):
            self._say("%g step(s) are fewer than %s was distilled for: take %g or more", steps, min(self.adapter.steps))

    def _say(self, text: str, value: object, *more: object) -> None:
        """A warning, once a run."""
        if text not in self.said:
            self.said.add(text)
            LOGGER.warning("ArcFlow: " + text, value, self.adapter.name, *more)
