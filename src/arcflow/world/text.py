"""The small FLUX's tokenizers and text encoders: a T5 for the tokens, a CLIP for the pooled vector.

Both are stock transformers classes, trained on captions alone before any image is drawn and frozen afterwards: from
the T5's output at a shape word, linear probes must tell what the caption says of that object (color, size, count,
place in the sentence, relation) and of the background; from CLIP's pooled output, what occurs and what goes with what.
The probes are thrown away. Padding is attended to, as `FluxPipeline` does, so training pads exactly as the pipeline.
"""

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from arcflow.world.scene import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    OPPOSITE,
    RADII,
    RELATIONS,
    SHAPES,
    SKILLS,
    Noun,
    Prompt,
    sample_prompt,
)

MAX_LENGTH = 16
"""Tokens of a caption with its end mark; no caption of the grammar is longer."""
WIDTH = 64
_PLURALS = [shape + "s" for shape in SHAPES]
_WORDS = [*COUNTS, *RADII, *COLORS, *SHAPES, *_PLURALS, "left", "right", "of", "above", "below", "and", "on"]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *_WORDS, *BACKGROUNDS])}


def build_tokenizer(vocabulary: dict[str, int] = VOCABULARY, max_length: int = MAX_LENGTH) -> PreTrainedTokenizerFast:
    """One token a word, lower case, commas dropped, `</s>` at the end."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(",", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_t5(words: int = len(VOCABULARY), *, width: int = WIDTH, layers: int = 3) -> T5EncoderModel:
    """An untrained encoder of tokens."""
    return T5EncoderModel(
        T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=16,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            pad_token_id=VOCABULARY["<pad>"],
            eos_token_id=VOCABULARY["</s>"],
        )
    )


def build_clip(
    words: int = len(VOCABULARY), *, width: int = WIDTH, layers: int = 2, max_length: int = MAX_LENGTH
) -> CLIPTextModel:
    """An untrained encoder of whole captions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=max_length,
            pad_token_id=VOCABULARY["<pad>"],
            bos_token_id=VOCABULARY["<unk>"],
            eos_token_id=VOCABULARY["</s>"],
        )
    )


class Probes(nn.Module):
    """What the encoders must make linearly readable."""

    def __init__(self) -> None:
        super().__init__()
        sizes = dict(
            color=len(COLORS) + 1,
            size=len(RADII) + 1,
            count=len(COUNTS),
            place=3,
            relation=len(RELATIONS) + 1,
            background=len(BACKGROUNDS) + 1,
        )
        self.token = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in sizes.items()})
        self.pooled = nn.Linear(WIDTH, len(bag(Prompt((Noun("ring"),)))))


def answers(prompt: Prompt) -> list[dict[str, int]]:
    """The probes' right answers for each noun of a caption; 0 means the caption does not say."""

    def index(choices: Sequence[str], value: str | None) -> int:
        return 0 if value is None else 1 + list(choices).index(value)

    return [
        dict(
            color=index(list(COLORS), noun.color),
            size=index(list(RADII), noun.size),
            count=noun.count - 1,
            place=place,
            relation=index(list(RELATIONS), prompt.relation),
            background=index(list(BACKGROUNDS), prompt.background),
        )
        for place, noun in enumerate(prompt.nouns)
    ]


def bag(prompt: Prompt) -> list[float]:
    """What occurs in a caption, and which attributes go with which shape, as zeros and ones."""
    number = sum(noun.count for noun in prompt.nouns)
    first, second = (prompt.relation, OPPOSITE[prompt.relation]) if prompt.relation else (None, None)
    sides = list(zip(prompt.nouns, (first, second, None), strict=False))
    return [
        *(float(prompt.background == b) for b in BACKGROUNDS),
        *(float(number == n) for n in COUNTS.values()),
        *(float(any(n.color == c for n in prompt.nouns)) for c in COLORS),
        *(float(any(n.size == r for n in prompt.nouns)) for r in RADII),
        *(float(any(n.shape == s for n in prompt.nouns)) for s in SHAPES),
        *(float(any((n.shape, n.color) == (s, c) for n in prompt.nouns)) for s in SHAPES for c in COLORS),
        *(float(any((n.shape, n.size) == (s, r) for n in prompt.nouns)) for s in SHAPES for r in RADII),
        *(float(any((n.shape, side) == (s, r) for n, side in sides)) for s in SHAPES for r in RELATIONS),
    ]


def text_loss(t5: T5EncoderModel, clip: CLIPTextModel, probes: Probes, prompts: list[Prompt], ids: Tensor) -> Tensor:
    """Cross-entropy of all probes on a batch of captions and their token ids (n, 16)."""
    shape_ids = torch.tensor([VOCABULARY[word] for word in (*SHAPES, *_PLURALS)])
    nouns = t5(ids)[0][torch.isin(ids, shape_ids)]  # row-major: captions in turn, words in order
    right = [answer for prompt in prompts for answer in answers(prompt)]
    loss = sum(
        nn.functional.cross_entropy(probe(nouns), torch.tensor([answer[name] for answer in right]))
        for name, probe in probes.token.items()
    )
    pooled = probes.pooled(clip(ids).pooler_output)
    return loss + nn.functional.binary_cross_entropy_with_logits(pooled, torch.tensor([bag(p) for p in prompts]))


def captions(count: int, seed: str, shares: dict[str, float] | None = None) -> list[Prompt]:
    """Training captions only: the held-out combinations are never read. `shares` weighs the skills."""
    rng = random.Random(seed)
    weights = shares or dict.fromkeys(SKILLS, 1.0)
    skills = rng.choices(list(weights), list(weights.values()), k=count)
    return [sample_prompt(rng, skill, "train") for skill in skills]


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids (n, 16 in this world), padded as the pipeline pads."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
