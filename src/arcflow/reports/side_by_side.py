"""One HTML file that shows a comparison: pictures, numbers, times, and the idea itself.

Everything is inside the file (style, PNGs as base64), nothing is fetched. The picture of the idea projects the latents
of one image on the plane that shows most of the teacher's curved path (its first two principal components): Euler's two
chords leave it at once, the student's two arcs follow. The plane is chosen by the teacher's path alone.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arcflow.evaluation.results import Evaluation
from arcflow.evaluation.side_by_side import Tracks
from arcflow.reports.page import EULER, FAINT, STUDENT, TEACHER, canvas, data, png, render, section, wide, write_page
from arcflow.sampling.generate import PARTS, Samples
from arcflow.system import files

TITLES = {"teacher": "teacher", "euler": "plain Euler", "arcflow": "ArcFlow"}

PART_TITLES = {"text_encoder": "text encoders", "transformer": "transformer", "vae": "VAE decoder"}


def write_report(
    path: Path,
    results: Evaluation,
    samples: dict[str, Samples],
    prompts: Sequence[str],
    ways: Sequence[Tracks],
    log: Sequence[dict[str, Any]],
    *,
    rows: int = 10,
) -> Path:
    """Write the report, and its picture of the idea as path.png beside it.

    It shows the first `rows` images of `samples`, whose prompts are `prompts`, and everything else.
    """
    picture = path_figure(ways)
    parts = [
        _head(results),
        section(
            "The idea",
            "One image's way from noise, in the plane of its teacher's path (principal components of the latents; the "
            "second axis is stretched). The teacher takes 50 small steps. Two straight steps of the same network miss "
            "the bend; the student's two calls each give a whole arc in closed form.",
            wide(picture, "teacher path, Euler chords and student arcs"),
        ),
        section(
            "Same prompts, same noise",
            "Each row starts from one noise. Above each column: how often the network was called.",
            _grid(results, samples, prompts, min(rows, len(prompts))),
        ),
        section(
            "Numbers",
            "Distance is the mean squared difference to the teacher's final latents from the same noise. Accuracy is "
            "the share of pictures that show exactly what the prompt says, read back by the checker.",
            _numbers(results),
        ),
        section("Time", "Milliseconds per image, by part.", _times(results)),
    ]
    if log:
        parts.append(
            section(
                "Training",
                "Loss of each iteration, and the student's distance to the teacher on held-out prompts; dashed, what "
                "plain Euler reaches. From the dotted line on the teacher is asked more and more on the student's own "
                "path instead of its own, where the same student has a larger loss.",
                wide(curves_figure(log), "loss and distance"),
            )
        )
    write_page(path, "arcflow: two calls instead of fifty", "".join(parts), vars(results.about))
    files.write_bytes(path.with_name("path.png"), picture)
    return path


def _title(row: str) -> str:
    return TITLES[row.split("_")[0]]


def _ours(row: str) -> str:
    return ' class="ours"' if row == "arcflow_2" else ""


def _head(results: Evaluation) -> str:
    teacher, ours, plain = results.teacher_50, results.arcflow_2, results.euler_2
    less = teacher.transformer / ours.transformer
    facts = [
        (f"{teacher.nfe} &rarr; {ours.nfe}", "network calls per image"),
        (f"{less:.0f}&times;", "less transformer time"),
        (f"{plain.mse_to_teacher / ours.mse_to_teacher:.1f}&times;", "closer to the teacher than Euler in 2"),
        (f"{ours.right:.1%}", f"right pictures (teacher {teacher.right:.1%})"),
    ]
    cards = "".join(f'<div class="fact"><b>{value}</b><span>{label}</span></div>' for value, label in facts)
    images = ours.prompts * ours.seeds
    return (
        "<h1>Two network calls instead of fifty</h1><p>A FLUX pipeline, its distilled student and plain Euler, all "
        f"through the stock diffusers pipeline, on {images} images of held-out prompts.</p>"
        f'<div class="facts">{cards}</div>'
    )


def _grid(results: Evaluation, samples: dict[str, Samples], prompts: Sequence[str], rows: int) -> str:
    def calls(row: str) -> str:
        nfe = results.rows[row].nfe
        return f"{nfe} call{'s' if nfe > 1 else ''}"

    head = "".join(f"<th{_ours(r)}>{_title(r)}<small>{calls(r)}</small></th>" for r in samples)
    lines = []
    for i in range(rows):
        cells = "".join(
            f'<td{_ours(r)}><img src="{data(png(s.images[i]))}" alt="{_title(r)}, {calls(r)}"></td>'
            for r, s in samples.items()
        )
        lines.append(f"<tr><td>{html.escape(prompts[i])}</td>{cells}</tr>")
    return f'<table class="grid"><tr><th></th>{head}</tr>{"".join(lines)}</table>'


def _numbers(results: Evaluation) -> str:
    skills = list(results.teacher_50.accuracy)
    head = "".join(f"<th>{skill.replace('_', ' ')}</th>" for skill in ("calls", "distance", *skills))
    lines = []
    for row, result in results.rows.items():
        accuracy = "".join(f"<td>{result.accuracy[skill]:.1%}</td>" for skill in skills)
        distance = f"{result.mse_to_teacher:.4f}"
        lines.append(f"<tr{_ours(row)}><td>{_title(row)}</td><td>{result.nfe}</td><td>{distance}</td>{accuracy}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def markdown_table(results: Evaluation) -> str:
    """The results as Markdown, with what made them."""
    lines = [
        "| | calls | distance | accuracy | weakest skill | transformer, ms per image | all, ms per image |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results.rows.items():
        mark = "**" if name.startswith("arcflow") else ""
        lines.append(
            f"| {mark}{_title(name)}{mark} | {row.nfe} | {row.mse_to_teacher:.4f} | {row.right:.1%} | "
            f"{row.weakest:.1%} | {1e3 * row.transformer:.1f} | {1e3 * row.seconds_per_image:.1f} |"
        )
    about, first = results.about, results.teacher_50
    images = first.prompts * first.seeds
    made = f"`{about.command}`, {images} images, {about.threads} threads on {about.device}"
    return "\n".join([*lines, "", f"Made by {made}, torch {about.versions['torch']}."])


def _times(results: Evaluation) -> str:
    head = "".join(f"<th>{PART_TITLES[part]}</th>" for part in PARTS)
    lines = []
    for row, result in results.rows.items():
        times = "".join(f"<td>{1000 * result.seconds[part]:.2f}</td>" for part in PARTS)
        total = f"<td>{1000 * result.seconds_per_image:.2f}</td>"
        lines.append(f"<tr{_ours(row)}><td>{_title(row)}, {result.nfe}</td>{times}{total}</tr>")
    return f"<table><tr><th>method, calls</th>{head}<th>together</th></tr>{''.join(lines)}</table>"


def plane(points: Tensor) -> Tensor:
    """Origin and two directions, as rows: the first two principal components of a path, noise left, image right."""
    center = points.mean(0)
    axes = torch.linalg.svd(points - center, full_matrices=False).Vh[:2]
    bend = (points - center) @ axes[1]
    signs = torch.stack([(points[-1] - points[0]) @ axes[0], bend[len(bend) // 2]]).sign()
    return torch.cat([center[None], axes * torch.where(signs == 0, torch.ones_like(signs), signs)[:, None]])


def path_figure(ways: Sequence[Tracks]) -> bytes:
    """The picture of the idea, one panel for each image, as PNG."""
    figure, panels = canvas(len(ways), 4.1 * len(ways) if len(ways) > 1 else 8.0, 4.3)
    for panel, way in zip(panels, ways, strict=True):
        _draw_way(panel, way)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=11, bbox_to_anchor=(0.5, -0.02))
    figure.tight_layout(rect=(0, 0.06, 1, 1), w_pad=2)
    return render(figure)


def _draw_way(panel: Any, way: Tracks) -> None:
    frame = plane(way.teacher)

    def flat(points: Tensor) -> np.ndarray:
        return ((points - frame[0]) @ frame[1:].T).numpy()

    teacher, chords, arcs = flat(way.teacher), flat(way.chords), [flat(arc) for arc in way.arcs]
    calls = np.stack([arc[0] for arc in arcs])
    panel.plot(*chords.T, color=EULER, lw=1.6, ls=(0, (5, 3)), zorder=2, label="plain Euler, 2 calls")
    panel.scatter(*chords[:-1].T, color=EULER, s=42, marker="s", zorder=3)
    panel.plot(*teacher.T, color=TEACHER, lw=4.5, alpha=0.3, solid_capstyle="round", zorder=3)
    panel.plot(*teacher.T, color=TEACHER, lw=0, marker=".", ms=4.5, zorder=4, label="teacher, 50 calls")
    panel.plot(*np.concatenate(arcs).T, color=STUDENT, lw=2.4, zorder=5, label="ArcFlow, 2 calls")
    panel.scatter(*calls.T, color="white", edgecolor=STUDENT, lw=2.2, s=62, zorder=6)
    panel.annotate("noise", teacher[0], (0, 14), textcoords="offset points", ha="center", color=TEACHER)
    for end, color in ((chords, EULER), (teacher, TEACHER), (arcs[-1], STUDENT)):
        panel.scatter(*end[-1], color=color, s=36, zorder=7)
    panel.set_title(way.prompt, fontsize=11, color="#0f172a", pad=10)
    panel.set(xticks=[], yticks=[])
    panel.margins(0.1, 0.16)
    _thumbnails(panel, way, {"teacher": teacher[-1], "arcs": arcs[-1][-1], "chords": chords[-1]})


def _thumbnails(panel: Any, way: Tracks, ends: dict[str, np.ndarray]) -> None:
    """The three final pictures in a column on the right, each tied to its end point, in the order of the end points."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    colors = {"teacher": TEACHER, "arcs": STUDENT, "chords": EULER}
    for place, name in enumerate(sorted(ends, key=lambda name: -ends[name][1])):
        size = way.ends[name].shape[0]
        picture = OffsetImage(way.ends[name], zoom=46 / size, interpolation="bilinear")
        box = AnnotationBbox(
            picture,
            tuple(ends[name]),
            xybox=(1.13, 0.84 - 0.34 * place),
            boxcoords="axes fraction",
            pad=0.12,
            bboxprops={"edgecolor": colors[name], "lw": 2},
            arrowprops={"arrowstyle": "-", "color": colors[name], "lw": 0.8, "alpha": 0.6},
            annotation_clip=False,
        )
        panel.add_artist(box)


def curves_figure(log: Sequence[dict[str, Any]]) -> bytes:
    """Loss and distance to the teacher over the iterations, as PNG."""
    figure, (left, right) = canvas(2, 11.0, 3.6)
    loss = np.array([(line["step"], line["loss"]) for line in log if line.get("loss") is not None], dtype=float)
    if len(loss):
        left.plot(*loss.T, color=FAINT, lw=0.8)
        window = max(1, len(loss) // 40)
        smooth = np.convolve(loss[:, 1], np.ones(window) / window, "valid")
        left.plot(loss[window - 1 :, 0], smooth, color=STUDENT, lw=2)
    for own in [line["step"] for line in log if line.get("teacher_ratio", 1.0) < 1][:1]:
        left.axvline(own, color=TEACHER, lw=1, ls=":")
    left.set(title="loss", xlabel="iteration", yscale="log")
    measured = [line for line in log if line.get("distance") is not None]
    steps, distances = [line["step"] for line in measured], [line["distance"] for line in measured]
    right.plot(steps, distances, color=STUDENT, lw=2, marker="o", ms=4)
    for name in ("euler_2", "euler_4", "euler_8"):
        for level in [line[name] for line in log if line.get(name) is not None][:1]:
            right.axhline(level, color=EULER, lw=1, ls="--")
            right.annotate(f"Euler, {name[-1]}", (1, level), (4, 0), xycoords=("axes fraction", "data"), va="center",
                           textcoords="offset points", color=EULER, fontsize=9, annotation_clip=False)  # fmt: skip
    right.set(title="distance to the teacher", xlabel="iteration", yscale="log")
    figure.tight_layout(w_pad=3)
    return render(figure)
