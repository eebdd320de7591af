"""The report of a comparison: one HTML file with tables, curves and the same noise through every method.

Methods are ranked by their distance to the teacher at the main number of calls, 2 where that was asked for. A mean
stands with the half width of its interval over the trainings; a mark says what is better or worse than the first
entrant's by more than noise.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from arcflow import paper
from arcflow.comparison.config import SHOWN
from arcflow.comparison.results import Comparison, Mean, Rows, counts, main_calls, ranked, verdict
from arcflow.comparison.subject import WORLD, Subject
from arcflow.reports.page import EULER, FAINT, STUDENT, TEACHER, Pixels, canvas, figure_png, write_page
from arcflow.reports.side_by_side import ImageRow, Shown
from arcflow.reports.side_by_side import calls as calls_told
from arcflow.reports.table import Cell, Line, Mark, Table
from arcflow.system import files

PALETTE = (STUDENT, "#dc2626", "#059669", "#9333ea", "#ca8a04", "#0891b2", "#db2777", "#4d7c0f", "#111827", "#b45309")

UNTRAINED = (EULER, "#94a3b8", "#475569")

LINES = 7
"""Entrants in a figure at most: more cannot be told apart. The tables have all."""

GAP = 0.075
"""Height of a label, as a share of the panel."""


@dataclass(frozen=True)
class CallsTable:
    """The table of one number of calls."""

    title: str
    table: Table


def write_ranking(path: Path, results: Comparison, folder: Path, subject: Subject = WORLD) -> Path:
    """Write the report of `comparison.runs.compare`'s results; `folder` has the images. The tables as Markdown
    and the curves against calls as PNG go beside it."""
    rows = results.rows
    calls = main_calls(rows)
    curves = calls_figure(rows, results.first)
    others = [n for n in counts(rows) if n != calls]
    trained = any(calls in row.calls and row.calls[calls].curve for row in rows.values())
    write_page(
        path,
        "comparison.html",
        about=results.about,
        calls=calls,
        first=rows[results.first].title,
        teacher_steps=paper.TEACHER_STEPS,
        tables=[CallsTable(f"At {n} call{'s' * (n > 1)}", _table(results, n)) for n in (calls, *others)],
        calls_figure=curves,
        cost_figure=cost_figure(rows, calls, results.first) if trained else None,
        drawn=_drawn(results, calls, folder, subject),
    )
    files.write_bytes(path.with_suffix(".png"), curves)
    files.write_text(path.with_suffix(".md"), markdown_ranking(results) + "\n")
    return path


def _table(results: Comparison, calls: int) -> Table:
    rows = results.rows
    order = ranked(results.rows, calls)
    skills = list(rows[order[0]].calls[calls].skills)
    lines = []
    for name in order:
        means = rows[name].calls[calls]
        apart = means.less_first
        note = ", second network" if rows[name].second_network else ""
        note += f", {means.broken} images not finite" if means.broken else ""
        line = Line.of(
            rows[name].title + note,
            Cell(with_interval(means.distance, ".4f"), _mark(apart.distance, better="lower")),
            Cell(with_interval(means.accuracy, ".1%"), _mark(apart.accuracy, better="higher")),
            Cell(with_interval(means.diversity, ".2f"), _mark(apart.diversity)),
            *([with_interval(means.to_real, ".1f")] if means.to_real else []),
            *(f"{means.skills[skill]:.0%}" for skill in skills),
            ours=name == results.first,
        )
        lines.append(line)
    return Table([*_heads(rows), *(skill.replace("_", " ") for skill in skills)], lines)


def _heads(rows: Rows) -> list[str]:
    """Of a table's first columns."""
    real = any(means.to_real for row in rows.values() for means in row.calls.values())
    return ["", "distance", "accuracy", "diversity", *(["to real pictures"] if real else [])]


def with_interval(value: Mean, form: str) -> str:
    """A mean, and half the width of its interval where there is one."""
    if value.low is None or value.high is None:
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} \u00b1 {(value.high - value.low) / 2:{form}}"


def _mark(apart: Mean | None, better: str = "") -> Mark:
    found = verdict(apart)
    if found == "same":
        return ""
    if not better:
        return "differs"
    return "better" if found == better else "worse"


def _drawn(results: Comparison, calls: int, folder: Path, subject: Subject) -> list[ImageRow]:
    """The images of the first prompts, a row for each: the teacher, then every entrant of which there are some."""
    rows = results.rows
    prompts = subject.held_out(results.about.count)[:SHOWN]
    found = [("teacher", paper.TEACHER_STEPS, folder / "teacher.png", False)]
    for name in ranked(rows, calls):
        job = folder / "runs" / rows[name].calls[calls].pictures[0]
        found.append((rows[name].title, calls, job.with_name(f"{job.name}-{calls}.png"), name == results.first))
    columns = [
        [Shown(title, calls_told(nfe), image, ours) for image in _cut(path, len(prompts))]
        for title, nfe, path, ours in found
        if path.exists()
    ]
    return [ImageRow(text, list(cells)) for text, *cells in zip(prompts, *columns, strict=True)] if columns else []


def _cut(path: Path, count: int) -> list[Pixels]:
    """The images of a strip of so many."""
    strip = np.asarray(Image.open(path).convert("RGB"))
    return np.split(strip, count, 1)


def ranking_table(results: Comparison) -> Table:
    """What the command prints: the ranking at the main number of calls."""
    rows = results.rows
    calls = main_calls(results.rows)
    lines = []
    for name in ranked(rows, calls):
        means = rows[name].calls[calls]
        numbers = f"{means.distance.mean:.4f}", f"{means.accuracy.mean:.1%}", f"{means.diversity.mean:.2f}"
        lines.append(Line.of(rows[name].title, calls, *numbers))
    return Table(["", "calls", "distance", "accuracy", "diversity"], lines)


def colors(rows: Rows) -> dict[str, str]:
    """One for each entrant, the same in every figure."""
    trained = iter(PALETTE * len(rows))
    untrained = iter(UNTRAINED * len(rows))
    return {name: next(trained if row.trained else untrained) for name, row in rows.items()}


def figure_colors(rows: Rows, first: str) -> dict[str, str]:
    """The entrants of a figure, with their colors: the first entrant, plain Euler, and the nearest to the teacher at
    the main number of calls, `LINES` in all."""
    order = [name for name in (first, "euler") if name in rows]
    order += [name for name in ranked(rows, main_calls(rows)) if name not in order]
    return {name: color for name, color in colors(rows).items() if name in order[:LINES]}


def spread_labels(heights: list[float]) -> list[float]:
    """Where labels stand, so that none covers another: each at its height where there is room, as shares of a panel."""
    places: list[float] = []
    for height in sorted(heights):
        places.append(max(height, places[-1] + GAP) if places else height)
    over = max(places[-1] - 1.0, 0.0) if places else 0.0
    spread = [place - over for place in places]
    order = sorted(range(len(heights)), key=heights.__getitem__)
    return [spread[order.index(i)] for i in range(len(heights))]


def calls_figure(rows: Rows, first: str) -> bytes:
    """Distance and accuracy against the number of calls, each line with its name, as PNG."""
    figure, (left, right) = canvas(2, 12.0, 4.6)
    wanted = figure_colors(rows, first)
    for name, color in wanted.items():
        means = rows[name].calls
        style = {"color": color, "marker": "o", "ms": 4, "lw": 2.4 if color == STUDENT else 1.4}
        style |= {} if rows[name].trained else {"ls": (0, (5, 3)), "marker": "s"}
        for panel, values in (
            (left, {n: m.distance for n, m in means.items()}),
            (right, {n: m.accuracy for n, m in means.items()}),
        ):
            panel.plot([*values], [value.mean for value in values.values()], label=rows[name].title, **style)
            for n, value in values.items():
                if value.low is not None and value.high is not None:
                    panel.plot([n, n], [value.low, value.high], color=color, lw=1, alpha=0.5)
    every = counts(rows)
    for panel, title in ((left, "distance to the teacher"), (right, "accuracy")):
        panel.set_xscale("log", base=2)
        panel.set_xticks(every, [str(n) for n in every])
        panel.set(title=title, xlabel="network calls")
    left.set_yscale("log")
    right.yaxis.set_major_formatter(lambda share, place: f"{share:.0%}")
    right.set_ylim(-0.02, 1.02)  # intervals of few trainings reach beyond what a share can be
    last = [rows[name].calls[max(rows[name].calls)].accuracy.mean for name in wanted]
    low, high = right.get_ylim()
    places = spread_labels([(value - low) / (high - low) for value in last])
    for (name, color), place in zip(wanted.items(), places, strict=True):
        weight = "bold" if name == first else "normal"
        style = {"transform": right.transAxes, "va": "center", "fontsize": 10, "fontweight": weight}
        right.text(1.03, place, rows[name].title, color=color, **style)
    figure.tight_layout(w_pad=3)
    return figure_png(figure)


def cost_figure(rows: Rows, calls: int, first: str) -> bytes:
    """Distance against what a training has cost, as PNG."""
    figure, (panel,) = canvas(1, 9.0, 4.6)
    for name, color in figure_colors(rows, first).items():
        means = rows[name].calls.get(calls)
        if means and means.curve:
            curve = np.array(means.curve)
            panel.plot(*curve.T, color=color, marker="o", ms=3.5, lw=1.6, label=rows[name].title)
        elif means:
            panel.axhline(means.distance.mean, color=color, ls="--", lw=1, label=rows[name].title)
    panel.set(xlabel="forward-equivalents", yscale="log", title=f"distance to the teacher, {calls} calls")
    panel.grid(axis="y", color=FAINT, lw=0.5)
    panel.title.set_color(TEACHER)
    figure.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=10)
    figure.tight_layout()
    return figure_png(figure)


def markdown_ranking(results: Comparison) -> str:
    """The results as Markdown tables, one for each number of calls, with what made them."""
    rows, about = results.rows, results.about
    parts = []
    for calls in counts(rows):
        lines = []
        for name in ranked(rows, calls):
            means = rows[name].calls[calls]
            line = Line.of(
                rows[name].title,
                with_interval(means.distance, ".4f"),
                with_interval(means.accuracy, ".1%"),
                with_interval(means.diversity, ".2f"),
                *([with_interval(means.to_real, ".1f")] if means.to_real else []),
                f"{min(means.skills.values()):.0%}",
                ours=name == results.first,
            )
            lines.append(line)
        table = Table([*_heads(rows), "weakest skill"], lines)
        parts += [f"{calls} call{'s' * (calls > 1)}:", table.markdown()]
    made = f"Made by `{about.command}`, {about.threads} threads on {about.device}"
    return "\n\n".join([*parts, f"{made}, torch {about.versions['torch']}."])
