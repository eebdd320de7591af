"""Prompts in words: ten digits, a few hundred ways to ask for each, one way in five held out."""

import hashlib
import random
from functools import cache
from itertools import product

ARTICLES = ("a", "the")
MANNERS = ("", "handwritten", "penned", "scribbled")
NOUNS = ("", "digit", "number", "figure")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ENDINGS = ("", "on paper", "by hand", "in pencil")

DIGITS = {name: digit for digit, name in enumerate(NAMES)} | {str(digit): digit for digit in range(10)}
"""The digit of each word that names one."""

OTHERS = [*ARTICLES, *MANNERS[1:], *NOUNS[1:], "on", "paper", "by", "hand", "in", "pencil"]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *OTHERS, *DIGITS])}
MAX_LENGTH = 8
"""Tokens of a prompt with its end mark."""


@cache
def prompts(digit: int, *, held_out: bool) -> list[str]:
    """All prompts for a digit on one side of the cut, in an order without meaning."""
    parts = product(ARTICLES, MANNERS, NOUNS, (NAMES[digit], str(digit)), ENDINGS)
    texts = [" ".join(word for word in words if word) for words in parts]
    random.Random(f"digits-{digit}").shuffle(texts)
    return [text for text in texts if _held_out(text) == held_out]


def _held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def held_out(count: int) -> list[str]:
    """Held-out prompts, the digits in turn; from the first again when there are no more."""
    ways = [prompts(digit, held_out=True) for digit in range(10)]
    return [ways[i % 10][i // 10 % len(ways[i % 10])] for i in range(count)]


def captions(count: int) -> list[str]:
    """Training prompts, the digits in turn; no more than there are."""
    ways = [prompts(digit, held_out=False) for digit in range(10)]
    shortest = min(map(len, ways))
    return [ways[i % 10][i // 10] for i in range(min(count, 10 * shortest))]


def digit_of(text: str) -> int:
    """The digit that a prompt asks for.

    Raises:
        ValueError: it names none, or several.
    """
    named = [DIGITS[word] for word in text.lower().split() if word in DIGITS]
    if len(named) != 1:
        raise ValueError(f"{text!r} names {len(named)} digits: expected one, as in 'a handwritten seven'")
    return named[0]
