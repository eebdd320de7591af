"""What text encoders make of prompts: computed once and looked up, or computed batch by batch."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arcflow.config import Run
from arcflow.data.batches import Prompts, Size
from arcflow.data.cache import Cache
from arcflow.data.images import read_images
from arcflow.families import family_of, network
from arcflow.families.conditioning import Cond
from arcflow.families.guidance import usual
from arcflow.families.identity import encoder_digest
from arcflow.system.processes import Ranks
from arcflow.system.text import Json


@runtime_checkable
class Encode(Protocol):
    """What gives conditioning."""

    def __call__(self, prompts: list[str], size: Size, sources: Sequence[str] = ()) -> Cond:
        """The conditioning of prompts for images of this size; `sources` are paths of images to edit."""
        ...


def encoder(
    pipe: DiffusionPipeline, config: Run, data: Prompts, device: torch.device, ranks: Ranks | None = None
) -> tuple[Encode, Cond | None]:
    """What gives the conditioning of prompts, and that of the empty prompt if the teacher is guided with it; nothing,
    where each sample has one of its own (`conditioning.against`). Where the run has a range of guidance, all are at the
    usual one of it: samples are told theirs later (`families.guidance.with_drawn_guidance`)."""
    against = [""] if config.distill.teacher_cfg > 1 else []
    known = [row.text for row in data.train] + data.held_out.prompts + against
    text: Callable[[list[str]], Cond] = partial(
        network.encode_text,
        pipe,
        max_sequence_length=config.data.max_sequence_length,
        device=config.model.text_device or device,
    )
    if config.data.embeddings:
        text = stored(pipe, config, device, ranks or Ranks())
        text.need(known)
    elif config.data.cache:
        text = EmbeddedPrompts(text, known)

    family = family_of(pipe.transformer)
    guidance = usual(config.distill.guidance, family)

    edit = None if config.data.sources == "none" else network.editing(family)

    def encode(prompts: list[str], size: Size, sources: Sequence[str] = ()) -> Cond:
        if sources:
            return network.encode_edits(
                pipe,
                prompts,
                read_images(sources, size),
                guidance=guidance,
                max_sequence_length=config.data.max_sequence_length,
                device=config.model.text_device or device,
                second=bool(against),
            )
        cond = {name: value.to(device) for name, value in text(prompts).items()}
        return network.place(pipe, cond, *size, guidance=guidance, family=family)

    if against and edit and edit.encode:
        return encode, {}
    return encode, encode(against, data.held_out.size) if against else None


def embedded(model: str, max_sequence_length: int | None) -> Json:
    """What embeddings depend on, beside the prompt. The text encoders are known by their weights where they are on this
    machine, else by the model's name alone."""
    return {"model": model, "max_sequence_length": max_sequence_length, "encoder": encoder_digest(model)}


WIDTHS = {"encoder_hidden_states": "joint_attention_dim", "pooled_projections": "pooled_projection_dim"}
"""What a transformer's configuration calls the widths of its conditioning."""


def stored(pipe: DiffusionPipeline, config: Run, device: torch.device, ranks: Ranks) -> Cache:
    """The cache that a run names. Raises ValueError if it is not of this model, or not as it was made.

    The first process holds the shards against their checksums, and the others find its note.
    """
    assert config.data.embeddings
    folder = Path(config.data.embeddings)
    about = embedded(config.model.base, config.data.max_sequence_length)
    opened = partial(Cache, folder, about, device, getattr(torch, config.model.dtype))
    if ranks.count > 1:
        ranks.agree(lambda: bool(opened()))
    cache = opened()
    for name, width in cache.widths().items():
        wanted = getattr(pipe.transformer.config, WIDTHS.get(name, ""), width)
        if width != wanted:
            raise ValueError(
                f"{config.data.embeddings}: {name} is {width} wide, and {config.model.base} takes {wanted}: expected "
                f"embeddings by its own text encoders; make another cache with `arcflow cache make`"
            )
    return cache


CHUNK = 64


class EmbeddedPrompts:
    """Conditioning by prompt, encoded once. Called with prompts it gives their batch."""

    def __init__(self, encode: Callable[[list[str]], Cond], prompts: Sequence[str]) -> None:
        unique = list(dict.fromkeys(prompts))
        self.row = {prompt: i for i, prompt in enumerate(unique)}
        chunks = [encode(unique[i : i + CHUNK]) for i in range(0, len(unique), CHUNK)]
        self.columns = {name: self._join([c[name] for c in chunks], name) for name in chunks[0]}

    def _join(self, values: list[Tensor], name: str) -> Tensor:
        if len({value.shape[1:] for value in values}) > 1:
            raise ValueError(
                f"{name} differs in length from prompt to prompt, expected one length: set data.cache to False"
            )
        return torch.cat(values)

    def __call__(self, prompts: list[str]) -> Cond:
        index = torch.tensor([self.row[prompt] for prompt in prompts])
        return {name: value[index.to(value.device)] for name, value in self.columns.items()}
