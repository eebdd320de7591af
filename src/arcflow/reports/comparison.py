"""The report of a comparison: one HTML file with tables, curves and the same noise through every method.

Methods are ranked by their distance to the teacher at the main number of calls, 2 where that was asked for. A mean
stands with the half width of its interval over the trainings; a number in the color of ArcFlow differs from the first
entrant's by more than noise.
"""

import html
from pathlib import Path

import numpy as np

from arcflow.comparison.results import Comparison, Mean, Rows, counts, main_calls, ranked, spread, verdict
from arcflow.reports.page import EULER, FAINT, STUDENT, TEACHER, canvas, data, render, section, wide, write_page
from arcflow.system import files

PALETTE = (STUDENT, "#dc2626", "#059669", "#9333ea", "#ca8a04", "#0891b2", "#db2777", "#4d7c0f", "#111827", "#b45309")

UNTRAINED = (EULER, "#94a3b8", "#475569")


def write_ranking(path: Path, results: Comparison, folder: Path) -> Path:
    """Write the report of `comparison.runs.compare`'s results; `folder` has the pictures. The tables as Markdown
    and the curves against calls as PNG go beside it."""
    rows, about = results.rows, results.about
    calls, curves = main_calls(rows), calls_figure(rows)
    trainings = f"{about.seeds} trainings of {about.budget:,} forward-equivalents each"
    parts = [
        f"<h1>Few calls, method by method</h1><p>The small teacher at 50 steps is the aim. {trainings}, "
        f"{about.count} held-out prompts, the same network, prompts and noise for all.</p>",
        section(
            f"Numbers at {calls} calls",
            "Distance: mean squared difference to the teacher's final latents from the same noise. Accuracy: share of "
            "pictures that show exactly what the prompt says. Diversity: distance between pictures of one prompt over "
            "the teacher's. With 95 % intervals over the trainings (Student's t).",
            _table(rows, calls, results.first),
        ),
        section(
            "Quality against calls",
            "Mean over the trainings. Solvers, which need none, are dashed.",
            wide(curves, "distance and accuracy against the number of calls"),
        ),
    ]
    if any(calls in row.calls and row.calls[calls].curve for row in rows.values()):
        text = f"Distance at {calls} calls on the first held-out prompts while the budget is spent, averaged weights."
        parts.append(section("Quality against training", text, wide(cost_figure(rows, calls), "distance against cost")))
    parts.append(section("Same prompts, same noise", f"{calls} calls, first training.", _strips(rows, calls, folder)))
    parts += [
        section(f"At {n} call{'s' * (n != 1)}", "", _table(rows, n, results.first)) for n in counts(rows) if n != calls
    ]
    write_page(path, "arcflow: few-step methods compared", "".join(parts), vars(about))
    files.write_bytes(path.with_suffix(".png"), curves)
    files.write_text(path.with_suffix(".md"), markdown_ranking(results) + "\n")
    return path


def _table(rows: Rows, calls: int, first: str) -> str:
    order = ranked(rows, calls)
    skills = list(rows[order[0]].calls[calls].skills)
    head = "".join(f"<th>{s.replace('_', ' ')}</th>" for s in ("distance", "accuracy", "diversity", *skills))
    lines = []
    for name in order:
        means = rows[name].calls[calls]
        cells = [
            _cell(means.distance, means.less_first.distance, ".4f"),
            _cell(means.accuracy, means.less_first.accuracy, ".1%"),
            _cell(means.diversity, means.less_first.diversity, ".2f"),
        ]
        cells += [f"<td>{means.skills[skill]:.0%}</td>" for skill in skills]
        mark = ' class="ours"' if name == first else ""
        note = ", second network" if rows[name].second_network else ""
        note += f", {means.broken} pictures not finite" if means.broken else ""
        lines.append(f"<tr{mark}><td>{html.escape(rows[name].title)}{note}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _cell(value: Mean, apart: Mean | None, form: str) -> str:
    text = spread(value, form)
    return f'<td class="ours">{text}</td>' if verdict(apart) != "same" else f"<td>{text}</td>"


def _strips(rows: Rows, calls: int, folder: Path) -> str:
    lines = [("teacher, 50 calls", folder / "teacher.png")]
    for name in ranked(rows, calls):
        job = folder / "runs" / rows[name].calls[calls].pictures[0]
        lines.append((rows[name].title, job.with_name(f"{job.name}-{calls}.png")))
    cells = [
        f'<tr><td>{html.escape(title)}</td><td><img style="max-width:none;width:768px" '
        f'src="{data(path.read_bytes())}" alt="{html.escape(title)}"></td></tr>'
        for title, path in lines
        if path.exists()
    ]
    return f'<table class="grid">{"".join(cells)}</table>'


def colors(rows: Rows) -> dict[str, str]:
    """One for each entrant, the same in every figure."""
    trained, untrained = iter(PALETTE * len(rows)), iter(UNTRAINED * len(rows))
    return {name: next(trained if row.trained else untrained) for name, row in rows.items()}


def calls_figure(rows: Rows) -> bytes:
    """Distance and accuracy against the number of calls, as PNG."""
    figure, (left, right) = canvas(2, 12.0, 4.6)
    for name, color in colors(rows).items():
        means = rows[name].calls
        style = {"color": color, "marker": "o", "ms": 4, "lw": 2.4 if color == STUDENT else 1.4}
        style |= {} if rows[name].trained else {"ls": (0, (5, 3)), "marker": "s"}
        for panel, values in (
            (left, {n: m.distance for n, m in means.items()}),
            (right, {n: m.accuracy for n, m in means.items()}),
        ):
            panel.plot([*values], [value.mean for value in values.values()], label=rows[name].title, **style)
            for n, value in values.items():
                if value.low is not None:
                    panel.plot([n, n], [value.low, value.high], color=color, lw=1, alpha=0.5)
    every = counts(rows)
    for panel, title in ((left, "distance to the teacher"), (right, "accuracy")):
        panel.set_xscale("log", base=2)
        panel.set_xticks(every, [str(n) for n in every])
        panel.set(title=title, xlabel="network calls")
    left.set_yscale("log")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=10)
    figure.tight_layout(w_pad=3)
    return render(figure)


def cost_figure(rows: Rows, calls: int) -> bytes:
    """Distance against what a training has cost, as PNG."""
    figure, (panel,) = canvas(1, 9.0, 4.6)
    for name, color in colors(rows).items():
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
    return render(figure)


def markdown_ranking(results: Comparison) -> str:
    """The results as Markdown tables, one for each number of calls, with what made them."""
    rows = results.rows
    lines: list[str] = []
    for calls in counts(rows):
        lines += [
            "",
            f"{calls} call{'s' * (calls != 1)}:",
            "",
            "| | distance | accuracy | diversity | weakest skill |",
        ]
        lines.append("|---|---|---|---|---|")
        for name in ranked(rows, calls):
            means = rows[name].calls[calls]
            bold = "**" if name == results.first else ""
            cells = [
                spread(means.distance, ".4f"),
                spread(means.accuracy, ".1%"),
                spread(means.diversity, ".2f"),
            ]
            weakest = min(means.skills.values())
            lines.append(f"| {bold}{rows[name].title}{bold} | {' | '.join(cells)} | {weakest:.0%} |")
    about = results.about
    made = f"Made by `{about.command}`, {about.threads} threads on {about.device}"
    return "\n".join([*lines[1:], "", f"{made}, torch {about.versions['torch']}."])
