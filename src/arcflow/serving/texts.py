"""Prompts as the text encoders give them: kept, padded so that others do not matter, put together by length."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from arcflow.families.conditioning import Cond

LENGTH = 64
"""Text that is padded to the longest of its batch (Qwen-Image's) is padded to multiples of this instead, and drawn with
its like alone: an image shall not depend on how long others' prompts are."""

Lengths = tuple[int, ...]
"""Tokens of a prompt, and of the negative one if there is any."""

Styles = tuple[tuple[str, float], ...]
"""Names and strengths of LoRAs."""


class Texts:
    """Encoded prompts, the ones used last; bounded in bytes."""

    def __init__(self, megabytes: int) -> None:
        self.limit = megabytes << 20
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.kept = OrderedDict[tuple[str, Styles], Cond]()

    def of(self, prompt: str, encode: Callable[[str], Cond], styles: Styles = ()) -> Cond:
        """What the text encoders make of a prompt; a style may be on them too."""
        key = (prompt, styles)
        if key in self.kept:
            self.hits += 1
            self.kept.move_to_end(key)
            return self.kept[key]
        self.misses += 1
        cond = encode(prompt)
        self.kept[key] = cond
        self.bytes += _bytes(cond)
        while self.bytes > self.limit and len(self.kept) > 1:
            self.bytes -= _bytes(self.kept.popitem(last=False)[1])
        return cond


def _bytes(cond: Cond) -> int:
    return sum(tensor.nbytes for tensor in cond.values())


def padded_text(cond: Cond) -> Cond:
    """Text of any length, with a mask, padded to the next multiple of `LENGTH`; always by one token at least, for a
    network without a masked token takes no mask. Text of the family's one length stays as it is."""
    mask = cond.get("encoder_hidden_states_mask")
    if mask is None:
        return cond
    more = LENGTH - mask.shape[1] % LENGTH
    return {name: nn.functional.pad(row, (0, 0) * (row.ndim - 2) + (0, more)) for name, row in cond.items()}


def lengths_of(text: tuple[Cond, ...]) -> Lengths:
    """Tokens of a prompt and of the negative one."""
    return tuple(cond["encoder_hidden_states"].shape[1] for cond in text)


def together(texts: Sequence[tuple[Cond, ...]]) -> list[list[int]]:
    """Places of the texts, those of equal lengths together."""
    lengths = [lengths_of(text) for text in texts]
    return [[place for place, length in enumerate(lengths) if length == one] for one in dict.fromkeys(lengths)]
