"""What reports are made of: one HTML file with its style and its images inside, and figures in one look.

Pages are Jinja2 templates in `templates/`, which escape whatever they are given. `base.html` has the look of all:
light and dark, as wide as a desk and as narrow as a phone.
"""

import base64
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from arcflow.system import files
from arcflow.system.packages import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEACHER, EULER, STUDENT, FAINT = "#334155", "#e8710a", "#2563eb", "#cbd5e1"

LARGE = 640
"""Pixels along a side, from which a page shows an image smaller."""

Pixels = UInt8[np.ndarray, "rows columns 3"]


@cache
def templates() -> Environment:
    """The templates; a name that a page does not get is an error, not a blank."""
    environment = Environment(
        loader=PackageLoader("arcflow.reports"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["png"] = source
    environment.filters["photo"] = photo
    return environment


def fill(template: str, **values: object) -> str:
    """A template's text with these values in it."""
    return templates().get_template(template).render(values)


def write_page(path: Path, template: str, **values: object) -> Path:
    """Write a filled template, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, fill(template, **values))
    return path


def image_png(image: Pixels) -> bytes:
    """An image as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return file.getvalue()


def source(image: bytes | Pixels) -> str:
    """An image, or a PNG file, as the source of an img."""
    content = image if isinstance(image, bytes) else image_png(image)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def photo(image: Pixels) -> str:
    """An image as the source of an img: a large one smaller and as JPEG, for a page holds many."""
    if max(image.shape[:2]) <= LARGE:
        return source(image)
    drawn = Image.fromarray(image)
    file = io.BytesIO()
    drawn.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    drawn.save(file, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def canvas(panels: int, width: float, height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure of that size in inches, and its panels, row by row."""
    library = need("matplotlib.figure", asked="the report", install="arcflow[demo]")
    figure = library.Figure(figsize=(width, height), dpi=160, facecolor="white")
    axes = list(figure.subplots(rows, panels // rows, squeeze=False).flatten())
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
        panel.tick_params(colors="#64748b", labelsize=9)
    return figure, axes


def figure_png(figure: "Figure") -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()
