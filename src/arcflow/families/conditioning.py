"""Conditioning as a dict of tensors, and its algebra: repeat, join, take rows.

The first axis of every tensor is the batch, but for position ids (`*_ids`), which all samples share."""

import torch
from torch import Tensor

Cond = dict[str, Tensor]

AGAINST = "img_against_"
"""Begins the names of what the empty prompt is, in samples that have one of their own: its text encoder has seen the
image to edit. A network is never told."""


def shared(name: str) -> bool:
    """Whether a conditioning tensor is the same for all samples: position ids are, others have a row for each."""
    return name.endswith("_ids")


def repeat(cond: Cond, times: int) -> Cond:
    """Conditioning of `times` copies of a batch, one batch after the other."""
    return {
        name: value if shared(name) else value.repeat(times, *[1] * (value.ndim - 1)) for name, value in cond.items()
    }


def beside(one: Cond, other: Cond) -> Cond:
    """Conditioning of two batches as one."""
    return {name: value if shared(name) else torch.cat([one[name], value]) for name, value in other.items()}


def rows(cond: Cond, part: slice | list[int]) -> Cond:
    """Conditioning of some samples of a batch."""
    return {name: value if shared(name) else value[part] for name, value in cond.items()}


def against(cond: Cond) -> Cond:
    """Conditioning of the empty prompt where samples have one of their own; else nothing."""
    return {name.removeprefix(AGAINST): value for name, value in cond.items() if name.startswith(AGAINST)}


def padded(rows: list[Tensor]) -> Cond:
    """Embeddings of prompts of unequal length as one tensor, with a mask that says which tokens there are."""
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


def masked(cond: Cond) -> list[Tensor]:
    """Embeddings of each prompt by itself, without what its mask leaves out: the inverse of `padded`."""
    both = zip(cond["encoder_hidden_states"], cond["encoder_hidden_states_mask"], strict=True)
    return [embeds[mask] for embeds, mask in both]


def latent_frames(cond: Cond) -> int:
    """Latent frames of a video; 1 of an image."""
    cells = cond.get("img_grid", cond.get("img_cells"))
    return int(cells[0, 0]) if cells is not None and cells.shape[1] == 3 else 1
