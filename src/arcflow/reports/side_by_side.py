"""One HTML file that shows a comparison: images, numbers, times, and the idea itself.

Everything is inside the file (style, PNGs as base64), nothing is fetched. The figure of the idea projects the latents
of one image on the plane that shows most of the teacher's curved path (its first two principal components): Euler's two
chords leave it at once, the student's two arcs follow. The plane is chosen by the teacher's path alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from arcflow.evaluation.results import Evaluation, Result
from arcflow.evaluation.side_by_side import Tracks
from arcflow.metrics.intervals import share_interval
from arcflow.reports.page import EULER, FAINT, STUDENT, TEACHER, Pixels, canvas, figure_png, write_page
from arcflow.reports.table import Line, Table
from arcflow.sampling.generate import PARTS, Samples
from arcflow.system import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"teacher": "teacher", "euler": "plain Euler", "arcflow": "ArcFlow"}

PART_TITLES = {"text_encoder": "text encoders", "transformer": "transformer", "vae": "VAE decoder"}

FEW = 0.03
"""Half the width of a share's interval from which the report says that its images are few."""


LogLine = Mapping[str, float | int | None]
"""What `log.jsonl` says of an iteration, as far as the curves show it."""


@dataclass(frozen=True)
class Shown:
    """An image in the report."""

    title: str
    calls: str
    image: Pixels
    ours: bool
    wrong: bool = False
    """Whether it does not show what its prompt says."""
    under: Pixels | None = None
    """The teacher's image, which is shown in its place where somebody points at it."""


@dataclass(frozen=True)
class ImageRow:
    """The images of a prompt, from one noise."""

    prompt: str
    cells: list[Shown]


def write_report(
    path: Path,
    results: Evaluation,
    samples: dict[str, Samples],
    prompts: Sequence[str],
    ways: Sequence[Tracks],
    log: Sequence[LogLine],
    *,
    rows: int = 10,
    is_right: Callable[[Pixels, str], bool] | None = None,
) -> Path:
    """Write the report, and its figure of the idea as path.png beside it.

    It shows the first `rows` images of `samples`, whose prompts are `prompts`, and everything else. Those that do not
    show what their prompts say, by `is_right`, are marked.
    """
    teacher = results.teacher_50
    ours = results.rows[results.own]
    plain = results.rows[results.plain]
    around = share_interval(ours.right, ours.prompts)
    points = (around.high - around.low) / 2
    write_page(
        path,
        "side_by_side.html",
        teacher=teacher,
        ours=ours,
        plain=plain,
        images=ours.prompts * ours.seeds,
        few=f"{100 * points:.0f}" if points > FEW else "",
        network=teacher.transformer / ours.transformer,
        whole=teacher.seconds_per_image / ours.seconds_per_image,
        nearer=plain.mse_to_teacher / ours.mse_to_teacher,
        right=f"{ours.right:.1%}",
        interval=f"{100 * around.low:.1f}, {100 * around.high:.1f}",
        teacher_right=f"{teacher.right:.1%}",
        paths=[path_figure([way], width=4.6) for way in ways],
        drawn=_drawn(results, samples, prompts[:rows], is_right or (lambda image, prompt: True)),
        numbers=_numbers(results),
        times=_times(results),
        curves=curves_figure(log) if log else None,
        about=results.about,
    )
    files.write_bytes(path.with_name("path.png"), path_figure(ways))
    return path


def calls(nfe: int) -> str:
    """A number of calls, in words."""
    return f"{nfe} call{'s' * (nfe > 1)}"


def _title(row: str) -> str:
    return TITLES[row.split("_")[0]]


def _drawn(
    results: Evaluation,
    samples: dict[str, Samples],
    prompts: Sequence[str],
    is_right: Callable[[Pixels, str], bool],
) -> list[ImageRow]:
    def shown(row: str, place: int) -> Shown:
        nfe = results.rows[row].nfe
        image = samples[row].images[place]
        wrong = not is_right(image, prompts[place])
        return Shown(_title(row), calls(nfe), image, row == results.own, wrong)

    return [ImageRow(prompt, [shown(row, place) for row in samples]) for place, prompt in enumerate(prompts)]


def _numbers(results: Evaluation) -> Table:
    skills = list(results.teacher_50.accuracy)
    heads = ["distance", *(skill.replace("_", " ") for skill in skills)]
    return _table(
        results, heads, lambda one: [f"{one.mse_to_teacher:.4f}", *(f"{one.accuracy[skill]:.1%}" for skill in skills)]
    )


def _times(results: Evaluation) -> Table:
    heads = [*(PART_TITLES[part] for part in PARTS), "together"]
    return _table(
        results,
        heads,
        lambda one: [f"{1000 * t:.2f}" for t in (*(one.seconds[part] for part in PARTS), one.seconds_per_image)],
    )


def _table(results: Evaluation, heads: list[str], cells: Callable[[Result], list[str]]) -> Table:
    """A line for each row of an evaluation: its title, its calls, and these cells."""
    lines = [Line.of(_title(row), one.nfe, *cells(one), ours=row == results.own) for row, one in results.rows.items()]
    return Table(["", "calls", *heads], lines)


def evaluation_table(results: Evaluation) -> Table:
    """What the command prints."""
    lines = [
        Line.of(_title(row), result.nfe, f"{result.mse_to_teacher:.4f}", f"{result.right:.1%}")
        for row, result in results.rows.items()
    ]
    return Table(["", "calls", "distance", f"right of {results.teacher_50.prompts}"], lines)


def markdown_table(results: Evaluation) -> str:
    """The results as Markdown, with what made them."""
    lines = [
        Line.of(
            _title(name),
            row.nfe,
            f"{row.mse_to_teacher:.4f}",
            f"{row.right:.1%}",
            f"{row.weakest:.1%}",
            f"{1e3 * row.transformer:.1f}",
            f"{1e3 * row.seconds_per_image:.1f}",
            ours=name.startswith("arcflow"),
        )
        for name, row in results.rows.items()
    ]
    head = ["", "calls", "distance", "accuracy", "weakest skill", "transformer, ms per image", "all, ms per image"]
    about, first = results.about, results.teacher_50
    images = first.prompts * first.seeds
    made = f"`{about.command}`, {images} images, {about.threads} threads on {about.device}"
    return f"{Table(head, lines).markdown()}\n\nMade by {made}, torch {about.versions['torch']}."


def plane(points: Tensor) -> Tensor:
    """Origin and two directions, as rows: the first two principal components of a path, noise left, image right."""
    center = points.mean(0)
    axes = torch.linalg.svd(points - center, full_matrices=False).Vh[:2]
    bend = (points - center) @ axes[1]
    signs = torch.stack([(points[-1] - points[0]) @ axes[0], bend[len(bend) // 2]]).sign()
    return torch.cat([center[None], axes * torch.where(signs == 0, torch.ones_like(signs), signs)[:, None]])


def path_figure(ways: Sequence[Tracks], width: float | None = None) -> bytes:
    """The figure of the idea, one panel for each image, as PNG; `width` is that of a panel in inches."""
    figure, panels = canvas(len(ways), (width or (4.1 if len(ways) > 1 else 8.0)) * len(ways), 4.3)
    for panel, way in zip(panels, ways, strict=True):
        _draw_way(panel, way)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=11, bbox_to_anchor=(0.5, -0.02))
    figure.tight_layout(rect=(0, 0.06, 1, 1), w_pad=2)
    return figure_png(figure)


def _draw_way(panel: "Axes", way: Tracks) -> None:
    frame = plane(way.teacher)

    def flat(points: Tensor) -> np.ndarray:
        return ((points - frame[0]) @ frame[1:].T).numpy()

    teacher = flat(way.teacher)
    chords = flat(way.chords)
    arcs = [flat(arc) for arc in way.arcs]
    starts = np.stack([arc[0] for arc in arcs])
    taken = calls(len(arcs))
    panel.plot(*chords.T, color=EULER, lw=1.6, ls=(0, (5, 3)), zorder=2, label=f"plain Euler, {taken}")
    panel.scatter(*chords[:-1].T, color=EULER, s=42, marker="s", zorder=3)
    panel.plot(*teacher.T, color=TEACHER, lw=4.5, alpha=0.3, solid_capstyle="round", zorder=3)
    panel.plot(*teacher.T, color=TEACHER, lw=0, marker=".", ms=4.5, zorder=4, label="teacher, 50 calls")
    panel.plot(*np.concatenate(arcs).T, color=STUDENT, lw=2.4, zorder=5, label=f"ArcFlow, {taken}")
    panel.scatter(*starts.T, color="white", edgecolor=STUDENT, lw=2.2, s=62, zorder=6)
    panel.annotate("noise", teacher[0], (0, 14), textcoords="offset points", ha="center", color=TEACHER)
    for end, color in ((chords, EULER), (teacher, TEACHER), (arcs[-1], STUDENT)):
        panel.scatter(*end[-1], color=color, s=36, zorder=7)
    panel.set_title(way.prompt, parse_math=False, fontsize=11, color="#0f172a", pad=10)
    panel.set(xticks=[], yticks=[])
    panel.margins(0.1, 0.16)
    _thumbnails(panel, way, {"teacher": teacher[-1], "arcs": arcs[-1][-1], "chords": chords[-1]})


def _thumbnails(panel: "Axes", way: Tracks, ends: dict[str, np.ndarray]) -> None:
    """The three final images in a column on the right, each tied to its end point, in the order of the end points."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    colors = {"teacher": TEACHER, "arcs": STUDENT, "chords": EULER}
    for place, name in enumerate(sorted(ends, key=lambda name: -ends[name][1])):
        size = way.ends[name].shape[0]
        image = OffsetImage(way.ends[name], zoom=46 / size, interpolation="bilinear")
        box = AnnotationBbox(
            image,
            tuple(ends[name]),
            xybox=(1.13, 0.84 - 0.34 * place),
            boxcoords="axes fraction",
            pad=0.12,
            bboxprops={"edgecolor": colors[name], "lw": 2},
            arrowprops={"arrowstyle": "-", "color": colors[name], "lw": 0.8, "alpha": 0.6},
            annotation_clip=False,
        )
        panel.add_artist(box)


def curves_figure(log: Sequence[LogLine]) -> bytes:
    """Loss and distance to the teacher over the iterations, as PNG."""
    figure, (left, right) = canvas(2, 11.0, 3.6)
    loss = _series(log, "loss")
    if len(loss):
        left.plot(*loss.T, color=FAINT, lw=0.8)
        window = max(1, len(loss) // 40)
        smooth = np.convolve(loss[:, 1], np.ones(window) / window, "valid")
        left.plot(loss[window - 1 :, 0], smooth, color=STUDENT, lw=2)
    own = [step for step, ratio in _series(log, "teacher_ratio") if ratio < 1]
    if own:
        left.axvline(own[0], color=TEACHER, lw=1, ls=":")
    left.set(title="loss", xlabel="iteration", yscale="log")

    right.plot(*_series(log, "distance").T, color=STUDENT, lw=2, marker="o", ms=4)
    levels = {f"Euler, {calls}": f"euler_{calls}" for calls in (2, 4, 8)} | {"teacher's walks": "walk"}
    for name, measured in levels.items():
        for _, level in _series(log, measured)[:1]:
            right.axhline(level, color=EULER, lw=1, ls="--")
            right.annotate(
                name,
                (1, level),
                (4, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                color=EULER,
                fontsize=9,
                annotation_clip=False,
            )
    right.set(title="distance to the teacher", xlabel="iteration", yscale="log")
    figure.tight_layout(w_pad=3)
    return figure_png(figure)


def _series(log: Sequence[LogLine], name: str) -> np.ndarray:
    """Iterations and what the log says of them, where it does: (lines, 2)."""
    found = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return np.array(found, dtype=float).reshape(-1, 2)
