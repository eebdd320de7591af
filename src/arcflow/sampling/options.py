"""The options that commands which draw have in common, each with one meaning; no torch, for help is instant."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from arcflow import config
from arcflow.config import Device, Dtype, Fit


def unset(metavar: str) -> Any:
    """How the help shows an option that is None unless given: its kind alone."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class ModelAndAdapter:
    model: str = "world"
    """Teacher: "world" for the shipped small one, a diffusers pipeline folder, or a Hub id."""
    adapter: str = "world"
    """Adapter folder or Hub "owner/name:subfolder"; "world" or "world-one" for those shipped for the shipped teacher,
    in two steps and in one, "none" for the teacher itself in plain Euler steps."""
    teacher_lora: Annotated[str | None, unset("STR")] = None
    """A LoRA on the teacher: file, folder or Hub id. An adapter that was distilled with one asks for it; "none" draws
    without."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    steps: Annotated[int | None, unset("INT")] = None
    """Network calls per image; by default what the adapter was made for, 50 for the teacher."""
    height: Annotated[int | None, unset("INT")] = None
    """Height in pixels; by default 64 for the shipped teacher, else 1024."""
    width: Annotated[int | None, unset("INT")] = None
    """Width in pixels; by default the height."""
    frames: Annotated[int | None, unset("INT")] = None
    """Frames of a video; by default what the adapter was distilled on, or the model draws."""
    guidance: Annotated[float | None, unset("FLOAT")] = None
    """Guidance; by default what the adapter was distilled with, or the model is meant for."""
    negative_prompt: Annotated[str | None, unset("STR")] = None
    """Text to guide away from, by a second call in each step."""
    true_cfg: Annotated[float | None, unset("FLOAT")] = None
    """Scale of that second call; by default 4 where there is a negative prompt, else a student makes none."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    batch: int = 8
    """Images at a time."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: Dtype | Literal["auto"] = "auto"
    """Precision of the weights; auto takes bfloat16 on cuda, else float32."""
    fit: Fit = "auto"
    """How the model is fitted to the card: whole, one part at a time, in 8 or 4 bits, or layer by layer; auto does what
    `arcflow doctor` advises."""
    fuse: FlagCreatePairsOff[bool] = False
    """Add the adapter's LoRA into copies of the weights: faster, for their memory; by default where there is room."""
    no_fuse: FlagCreatePairsOff[bool] = False
    """Leave the weights as they are."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    ray: FlagCreatePairsOff[bool] = False
    """Work on Ray: on this machine, or on a cluster with --address (needs arcflow[ray])."""
    address: Annotated[str | None, unset("HOST:PORT")] = None
    """A running cluster, or "auto"; by default Ray is started here, for this command alone."""
    workers: Annotated[int | None, unset("INT")] = None
    """Processes, each with the model; by default as many as there is room for."""
    cpus: float = 1.0
    """CPUs of each of them."""
    gpus: Annotated[float | None, unset("FLOAT")] = None
    """GPUs of each; by default one where the cluster has any."""

    def check(self) -> None:
        """Raises a ValueError if Ray's options are given without it, or are out of range."""
        given = [one.name for one in fields(self) if getattr(self, one.name) != one.default and one.name != "ray"]
        if given and not self.ray:
            raise ValueError(f"--{given[0]} says how to work on Ray: expected --ray with it, or leave it out")
        config.check(self.workers is None or self.workers >= 1, "--workers", self.workers, "1 or more", "leave it out")
        config.check(self.cpus >= 0, "--cpus", self.cpus, "0 or more", "leave it out for 1")
        config.check(self.gpus is None or self.gpus >= 0, "--gpus", self.gpus, "0 or more", "leave it out")
