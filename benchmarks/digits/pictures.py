"""The pictures in two halves, the classifier that checks images, and the distance of a set of images to real ones."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from arcflow.metrics.sets import kernel_distance
from arcflow.system.packages import need
from benchmarks.digits.words import digit_of

SIZE, LEVELS = 8, 16
"""Pixels along a side; gray levels above black."""

SUBSETS = 10

Half = Literal["teacher", "checker"]


class Pictures(NamedTuple):
    """Real pictures, and the digits that they show."""

    images: UInt8[np.ndarray, "count 8 8 3"]
    digits: Int[np.ndarray, " count"]


@cache
def pictures(half: Half) -> Pictures:
    """Every second picture: both halves have every writer."""
    found: Any = need("sklearn.datasets", asked="the digits", install="arcflow[digits]").load_digits()
    mine = slice(0 if half == "teacher" else 1, None, 2)
    gray = np.rint(found.images[mine] * (255 / LEVELS)).astype(np.uint8)
    return Pictures(np.repeat(gray[..., None], 3, axis=-1), found.target[mine])


def pixels(images: UInt8[np.ndarray, "count 8 8 3"]) -> Float[Tensor, "count 64"]:
    """The gray of each pixel, from 0 to 1: the features of diversity and of the kernel distance. No network that knows
    digits is between, so nothing that was trained has a say in them."""
    return torch.from_numpy(images).float().mean(-1).flatten(1) / 255


@cache
def checker() -> Any:
    """A support vector machine with a Gaussian kernel, trained on the half that the teacher never sees. Width and cost
    are those of scikit-learn's own example of these digits, the cost ten times as high."""
    svm = need("sklearn.svm", asked="the digits' checker", install="arcflow[digits]")
    real = pictures("checker")
    return svm.SVC(gamma=0.001, C=10.0).fit(_levels(real.images), real.digits)


def read(images: UInt8[np.ndarray, "count 8 8 3"]) -> Int[np.ndarray, " count"]:
    """The digits that the checker sees. It always sees one: images of nothing are right one time in ten."""
    return checker().predict(_levels(images))


def _levels(images: UInt8[np.ndarray, "count 8 8 3"]) -> Float[np.ndarray, "count 64"]:
    return pixels(images).double().numpy() * LEVELS


def right(images: UInt8[np.ndarray, "count 8 8 3"], prompts: Sequence[str]) -> list[bool]:
    """Which images show the digits of their prompts."""
    return [bool(seen == digit_of(text)) for seen, text in zip(read(images), prompts, strict=True)]


def checker_error() -> float:
    """Share of the teacher's real pictures, which the checker has not seen, that it reads wrongly."""
    real = pictures("teacher")
    return float(np.mean(read(real.images) != real.digits))


def distance_to_real(images: UInt8[np.ndarray, "count 8 8 3"]) -> float:
    """Kernel distance (KID) of the pixels to those of real pictures that the teacher has not seen, times 1000."""
    drawn, real = pixels(images), pixels(pictures("checker").images)
    size = min(len(drawn), len(real))
    return 1000 * kernel_distance(drawn, real, subsets=SUBSETS, subset_size=size).mean
