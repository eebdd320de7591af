"""What reports are made of: one HTML file with its style and its pictures inside, and figures in one look."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arcflow.system import files
from arcflow.system.packages import need

TEACHER, EULER, STUDENT, FAINT = "#334155", "#e8710a", "#2563eb", "#cbd5e1"

STYLE = """
:root { color-scheme: light; --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --mark: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 34px; line-height: 1.15; margin: 0 0 8px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.01em; }
p { margin: 0 0 16px; color: var(--soft); max-width: 75ch; }
section { background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: 24px; margin-top: 24px; }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; margin-top: 28px; }
.fact { background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px; }
.fact b { display: block; font-size: 28px; letter-spacing: -0.02em; color: var(--mark); line-height: 1.2; }
.fact span { color: var(--soft); font-size: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { font-weight: 600; color: var(--soft); text-align: right; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
tr:last-child td { border-bottom: 0; }
tr.ours td, td.ours, th.ours { background: #eff6ff; }
table.grid td, table.grid th { text-align: center; padding: 5px; border: 0; }
table.grid td:first-child { text-align: left; font-size: 14px; width: 170px; padding-right: 12px; }
table.grid th small { display: block; font-weight: 400; }
table.grid img { width: 100%; min-width: 72px; max-width: 112px; display: block; margin: auto; border-radius: 8px; }
img.wide { width: 100%; display: block; }
footer { color: var(--soft); font-size: 13px; margin-top: 24px; white-space: pre-wrap; }
@media (max-width: 720px) { .facts { grid-template-columns: 1fr 1fr; } }
"""


def write_page(path: Path, title: str, body: str, about: dict[str, Any]) -> Path:
    """The whole file, with what it was made with below."""
    footer = html.escape("\n".join(f"{name}: {value}" for name, value in about.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><main>{body}<footer>{footer}</footer></main></body></html>\n"
    )
    files.write_text(path, page)
    return path


def section(title: str, text: str, content: str) -> str:
    """A card: what it shows, in words and as content."""
    return f'<section><h2>{title}</h2><p>{text}</p><div class="scroll">{content}</div></section>'


def png(image: np.ndarray) -> bytes:
    """A picture (height, width, 3) uint8 as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", optimize=True)
    return file.getvalue()


def data(image: bytes) -> str:
    """A PNG file as the source of an img."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def wide(image: bytes, label: str) -> str:
    """A picture as wide as its card."""
    return f'<img class="wide" src="{data(image)}" alt="{label}">'


def canvas(panels: int, width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure of that size in inches, and its panels, row by row."""
    library = need("matplotlib.figure", asked="the report", install="arcflow[demo]")
    figure = library.Figure(figsize=(width, height), dpi=160, facecolor="white")
    axes = figure.subplots(rows, panels // rows, squeeze=False).flatten()
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
        panel.tick_params(colors="#64748b", labelsize=9)
    return figure, axes


def render(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()
