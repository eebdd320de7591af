"""The exact checker: reads an image back into a scene and holds it against the caption, skill by skill.

Reading: the background is the nearest palette color of the border's median; what differs from it falls into connected
components; the color of a component is the palette color nearest to its core's median; its shape is the one whose
rendering at the component's own centroid and area overlaps it best (soft intersection over union). A component that
resembles nothing is an object of shape "unknown" and fails every caption, as does any object too many.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import ndimage

from arcflow.world.render import AREA, CENTROID, coverage, render
from arcflow.world.scene import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE,
    SKILLS,
    Object,
    Prompt,
    Scene,
    holds,
    parse,
    sample_prompt,
    sample_scene,
)

CONTRAST = 45
"""A pixel belongs to an object when a channel differs from the background by this much (of 255)."""
SPECK = 12
"""Components of fewer pixels are noise, not objects; the smallest object has about 60."""
OVERLAP = 0.75
"""Least soft intersection over union with the best shape; another shape reaches 0.85 at most, a true one 0.9."""
TINT = 70.0
"""Greatest distance (RGB, of 255) from a palette color that still counts as that color."""


def read_scene(image: np.ndarray) -> Scene:
    """The scene in an image (64, 64, 3) uint8.

    Raises:
        ValueError: the array is not one 64 x 64 RGB image of type uint8.
    """
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image ({SIZE}, {SIZE}, 3), got {image.dtype} {image.shape}")
    image = image.astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background, paper = _nearest(np.median(border, axis=0), BACKGROUNDS)
    apart = np.abs(image - paper) > CONTRAST
    found: Any = ndimage.label(apart[..., 0] | apart[..., 1] | apart[..., 2])
    labels = found[0]
    objects = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        part = labels[box] == index
        if part.sum() >= SPECK:
            objects.append(_read_object(image, paper, labels, index, box))
    return Scene(background, tuple(objects))


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, np.ndarray]:
    values = np.array(list(palette.values()), np.float32)
    distances = np.linalg.norm(values - color, axis=1)
    best = int(distances.argmin())
    name = list(palette)[best] if distances[best] < TINT else "unknown"
    return name, values[best] if name != "unknown" else color


def _read_object(
    image: np.ndarray, paper: np.ndarray, labels: np.ndarray, index: int, box: tuple[slice, slice]
) -> Object:
    rows, columns = (slice(max(0, s.start - 2), min(SIZE, s.stop + 2)) for s in box)
    near = np.asarray(ndimage.binary_dilation(labels[rows, columns] == index), bool)
    mine = near & ((labels[rows, columns] == 0) | (labels[rows, columns] == index))
    offset = image[rows, columns] - paper
    strength = np.linalg.norm(offset, axis=-1) * mine
    core = strength >= np.quantile(strength[labels[rows, columns] == index], 0.5)
    color, ink = _nearest(np.median(image[rows, columns][core], axis=0), COLORS)
    direction = ink - paper
    alpha = np.clip(offset @ direction / max(float(direction @ direction), 1.0), 0, 1) * mine
    shape, x, y, radius = _fit(alpha, rows, columns)
    return Object(shape, color, x, y, radius)


def _fit(alpha: np.ndarray, rows: slice, columns: slice) -> tuple[str, float, float, float]:
    area = float(alpha.sum())
    x = float((alpha.sum(0) * (np.arange(columns.start, columns.stop) + 0.5)).sum() / area)
    y = float((alpha.sum(1) * (np.arange(rows.start, rows.stop) + 0.5)).sum() / area)
    fits = []
    for shape, unit in AREA.items():
        radius = (area / unit) ** 0.5
        center = y - CENTROID.get(shape, 0.0) * radius
        drawn = coverage(shape, x, center, radius, rows, columns)
        fits.append((np.minimum(drawn, alpha).sum() / np.maximum(drawn, alpha).sum(), shape, center, radius))
    overlap, shape, center, radius = max(fits)
    return (shape if overlap >= OVERLAP else "unknown"), x, center, float(radius)


def is_right(image: np.ndarray, prompt: str | Prompt) -> bool:
    """Whether the image shows exactly what the caption says."""
    return holds(parse(prompt) if isinstance(prompt, str) else prompt, read_scene(image))


def accuracy(images: Iterable[np.ndarray], prompts: Sequence[str | Prompt]) -> dict[str, float]:
    """Share of images that show what their captions say: "overall" and one entry per skill that occurs."""
    parsed = [parse(p) if isinstance(p, str) else p for p in prompts]
    right = [is_right(image, prompt) for image, prompt in zip(images, parsed, strict=True)]
    skills = {s: [ok for ok, p in zip(right, parsed, strict=True) if p.skill == s] for s in SKILLS}
    return {"overall": float(np.mean(right))} | {s: float(np.mean(oks)) for s, oks in skills.items() if oks}


def one_word_changes(prompt: Prompt) -> list[Prompt]:
    """Every caption that differs in one word of the same kind."""
    changed = []
    for i, noun in enumerate(prompt.nouns):
        swaps = [replace(noun, shape=s) for s in SHAPES if s != noun.shape]
        swaps += [replace(noun, color=c) for c in COLORS if noun.color and c != noun.color]
        swaps += [replace(noun, size=r) for r in RADII if noun.size and r != noun.size]
        swaps += [replace(noun, count=n) for n in COUNTS.values() if n != noun.count]
        changed += [replace(prompt, nouns=(*prompt.nouns[:i], swap, *prompt.nouns[i + 1 :])) for swap in swaps]
    changed += [replace(prompt, relation=r) for r in RELATIONS if prompt.relation and r != prompt.relation]
    changed += [replace(prompt, background=b) for b in BACKGROUNDS if prompt.background and b != prompt.background]
    return changed


def self_test(count: int, seed: int) -> dict[str, float]:
    """Shares, on rendered images, of true captions that the checker accepts and of changed ones that it rejects."""
    rng = random.Random(seed)
    accepted, rejected = [], []
    for _ in range(count):
        prompt = sample_prompt(rng)
        scene = read_scene(render(sample_scene(prompt, rng)))
        accepted.append(holds(prompt, scene))
        rejected.append(not holds(rng.choice(one_word_changes(prompt)), scene))
    return {"accepts true captions": float(np.mean(accepted)), "rejects changed captions": float(np.mean(rejected))}
