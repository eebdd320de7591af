"""Scenes to images: every shape is a signed distance, every edge one pixel of anti-aliasing.

The coverage of a pixel is clip(1/2 - distance, 0, 1), the distance taken at its center in pixels (negative inside).
All shapes of radius r fit a square of half-width 1.05 r around the object's center.
"""

from collections.abc import Sequence

import numpy as np

from arcflow.world.scene import BACKGROUNDS, COLORS, SIZE, Scene

SQUARE, HOLE, TRIANGLE = 0.88, 0.5, 1.2
"""Half-width of the square, hole of a ring, circumradius of the triangle; in radii."""

AREA = {
    "circle": np.pi,
    "square": 4 * SQUARE**2,
    "triangle": 0.75 * 3**0.5 * TRIANGLE**2,
    "ring": np.pi * (1 - HOLE**2),
}
"""Area of a shape of radius 1."""

CENTROID = {"triangle": TRIANGLE / 4}
"""How far the center of mass lies below the object's center, in radii; 0 for the others."""


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (pixels, negative inside; a lower bound near corners) at offsets (dx, dy) from the center."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(ax, ay) - SQUARE * radius
    if shape == "triangle":
        big = TRIANGLE * radius
        y = dy - big / 4  # from the centroid
        return np.maximum(y, 3**0.5 / 2 * ax - y / 2) - big / 2
    if shape == "ring":
        middle = radius * (1 + HOLE) / 2
        return np.abs(np.hypot(dx, dy) - middle) - (radius - middle)
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(AREA)}")


def coverage(shape: str, x: float, y: float, radius: float, rows: slice, columns: slice) -> np.ndarray:
    """Share of each pixel that the shape covers, over a window of the image."""
    dy = np.arange(rows.start, rows.stop)[:, None] + 0.5 - y
    dx = np.arange(columns.start, columns.stop)[None, :] + 0.5 - x
    return np.clip(0.5 - signed_distance(shape, dx, dy, radius), 0, 1)


def window(center: float, radius: float) -> slice:
    """The pixels of one axis that a shape can touch."""
    reach = 1.05 * radius + 1.5
    return slice(max(0, int(center - reach)), min(SIZE, int(center + reach) + 2))


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: (64, 64, 3) uint8."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        rows, columns = window(o.y, o.radius), window(o.x, o.radius)
        alpha = coverage(o.shape, o.x, o.y, o.radius, rows, columns)[..., None]
        image[rows, columns] += alpha * (np.array(COLORS[o.color]) - image[rows, columns])
    return np.round(image).astype(np.uint8)


def render_all(scenes: Sequence[Scene]) -> np.ndarray:
    """The images of many scenes: (n, 64, 64, 3) uint8."""
    return np.stack([render(scene) for scene in scenes])
