"""Prompts, and what a pipeline makes of them: the only data a distillation needs.

Which prompts and which noise iteration n gets is a function of the run's seed and n, nothing else, so an interrupted
run goes on as if nothing had happened. Samples are counted through the whole run: epoch e walks through all prompts
in a random order of its own, and sample i has noise of its own. Text encoders are frozen: a small pipeline's
embeddings are computed once, in fixed chunks, and kept in memory (one encoding per prompt, whatever batch asks for
it); a large one encodes every batch.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arcflow.backbone import Cond
from arcflow.config import Data, Optim
from arcflow.state import seed_of

CHUNK = 64


def shared(name: str) -> bool:
    """Whether a conditioning tensor is the same for all samples: position ids are, others have a row for each."""
    return name.endswith("_ids")


def repeat(cond: Cond, times: int) -> Cond:
    """Conditioning of `times` copies of a batch, one batch after the other."""
    return {
        name: value if shared(name) else value.repeat(times, *[1] * (value.ndim - 1)) for name, value in cond.items()
    }


def rows(cond: Cond, part: slice) -> Cond:
    """Conditioning of some samples of a batch."""
    return {name: value if shared(name) else value[part] for name, value in cond.items()}


def micro_batches(count: int, optim: Optim) -> Iterator[slice]:
    """A batch in pieces that fit in memory."""
    size = optim.micro_batch or optim.batch
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


class PromptData:
    """Training batches by number, and the held-out prompts with their noise seeds."""

    def __init__(self, config: Data, *, seed: int, batch: int) -> None:
        self.seed, self.size = seed, batch
        self.train, self.held_out = prompt_sets(config, seed)
        self.held_out_seeds = [seed_of(seed, "held-out noise", i) for i in range(len(self.held_out))]
        self._orders: dict[int, list[int]] = {}

    def batch(self, step: int) -> tuple[list[str], list[int]]:
        """Prompts and noise seeds of iteration `step`, counted from 0."""
        samples = range(step * self.size, (step + 1) * self.size)
        return [self.prompt(i) for i in samples], [seed_of(self.seed, "noise", i) for i in samples]

    def prompt(self, sample: int) -> str:
        """Prompt of a sample, by its number in the run."""
        epoch, place = divmod(sample, len(self.train))
        if epoch not in self._orders:
            shuffle = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
            kept = {e: order for e, order in self._orders.items() if e == epoch - 1}  # a batch may span two epochs
            self._orders = kept | {epoch: torch.randperm(len(self.train), generator=shuffle).tolist()}
        return self.train[self._orders[epoch][place]]


def prompt_sets(config: Data, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; those of a file without a held-out file of its own are its last ones."""
    held_out = read_prompts(config.held_out)[: config.held_out_count] if config.held_out else []
    if config.prompts == "world":
        from arcflow.world.scene import sample_prompts  # the grammar is needed here only

        train = [p.text for p in sample_prompts(config.count, seed, split="train")]
        return train, held_out or [p.text for p in sample_prompts(config.held_out_count, seed, split="test")]
    train = read_prompts(config.prompts)
    if held_out:
        return train, held_out
    if len(train) <= config.held_out_count:
        raise ValueError(
            f"{config.prompts} has {len(train)} prompts and {config.held_out_count} are to be held out: "
            f"expected more of them; lower data.held_out_count or give data.held_out a file of its own"
        )
    return train[: -config.held_out_count], train[-config.held_out_count :]


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt file (one a line, empty lines skipped) or a .jsonl file (the "prompt" of every object)."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"no prompt file {str(path)!r}: expected a .txt (one prompt a line) or .jsonl file; check the path"
        )
    lines = [(number, line.strip()) for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise ValueError(f"{path} is empty: expected one prompt a line; fill it")
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(line, f"{path}, line {number}") for number, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: {line[:60]!r}, expected a JSON object with a "prompt"; correct the line') from error
    return str(prompt)


class Table:
    """Conditioning by prompt, encoded once. Called with prompts it gives their batch."""

    def __init__(self, encode: Callable[[list[str]], Cond], prompts: Sequence[str]) -> None:
        unique = list(dict.fromkeys(prompts))
        self.row = {prompt: i for i, prompt in enumerate(unique)}
        chunks = [encode(unique[i : i + CHUNK]) for i in range(0, len(unique), CHUNK)]
        self.shared = {name: value for name, value in chunks[0].items() if shared(name)}
        self.columns = {name: self._join([c[name] for c in chunks], name) for name in chunks[0].keys() - self.shared}

    def _join(self, values: list[Tensor], name: str) -> Tensor:
        if len({value.shape[1:] for value in values}) > 1:
            raise ValueError(
                f"{name} differs in length from prompt to prompt, expected one length: set data.cache to False"
            )
        return torch.cat(values)

    def __call__(self, prompts: list[str]) -> Cond:
        index = torch.tensor([self.row[prompt] for prompt in prompts])
        columns = {name: value[index.to(value.device)] for name, value in self.columns.items()}
        return self.shared | columns
