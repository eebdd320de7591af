"""One HTML file that shows teacher, plain Euler and student of any model on a handful of prompts.

It is made of the same parts as the report of the small world, less what needs a checker. Large images are shown
smaller; whole they lie in the folder beside it.
"""

from collections.abc import Sequence
from pathlib import Path

from arcflow.evaluation.handful import WAYS
from arcflow.evaluation.results import Handful, Way
from arcflow.metrics.motion import strip
from arcflow.reports.page import write_page
from arcflow.reports.side_by_side import PART_TITLES, ImageRow, Shown, calls
from arcflow.reports.table import Line, Table
from arcflow.sampling.generate import PARTS, Samples

TITLES = {"teacher": "teacher", "euler": "plain Euler", "student": "ArcFlow"}

ROWS = 64
"""Images of each that a page shows at most; all are in the folder."""


def write_handful(path: Path, results: Handful, samples: dict[str, Samples], prompts: Sequence[str]) -> Path:
    """Write the page; `prompts` are those of the samples, one for each image."""
    teacher, euler, student = results.teacher, results.euler, results.student
    known = student.low is not None and student.high is not None
    return write_page(
        path,
        "handful.html",
        teacher=teacher,
        euler=euler,
        student=student,
        model="The small FLUX that comes with the package" if results.model == "world" else results.model,
        size=f"{results.height} x {results.width} pixels",
        images=len(prompts),
        whole=two_digits(teacher.seconds_per_image / student.seconds_per_image),
        network=two_digits(teacher.transformer / student.transformer),
        nearer=two_digits(euler.mse_to_teacher / student.mse_to_teacher) if student.mse_to_teacher else "\u221e",
        distance=two_digits(student.mse_to_teacher),
        interval=f"{two_digits(student.low)}, {two_digits(student.high)}" if known else "",
        moving=" Of a video four frames are shown, from the first to the last." if results.frames > 1 else "",
        drawn=[_line(results, samples, prompt, place) for place, prompt in enumerate(prompts[:ROWS])],
        numbers=handful_table(results),
        about=results.about,
    )


def two_digits(value: float | None) -> str:
    """Two digits, which are more than a handful of prompts can tell; of a large number all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _line(results: Handful, samples: dict[str, Samples], prompt: str, place: int) -> ImageRow:
    def shown(name: str) -> Shown:
        image = strip(samples[name].images[place])
        ours = name == "student"
        under = strip(samples["teacher"].images[place]) if ours else None
        return Shown(TITLES[name], calls(results.rows[name].nfe), image, ours, under=under)

    return ImageRow(prompt, [shown(name) for name in WAYS])


def handful_table(results: Handful) -> Table:
    """A line for each way to sample; what the command prints as well."""

    def cells(one: Way) -> list[str]:
        around = (
            "" if one.low is None or not one.mse_to_teacher else f" [{two_digits(one.low)}, {two_digits(one.high)}]"
        )
        times = (*(one.seconds[part] for part in PARTS), one.seconds_per_image)
        return [f"{two_digits(one.mse_to_teacher)}{around}", *(f"{seconds:.3g}" for seconds in times)]

    lines = [Line.of(TITLES[name], one.nfe, *cells(one), ours=name == "student") for name, one in results.rows.items()]
    return Table(["", "calls", "distance", *(PART_TITLES[part] + ", s" for part in PARTS), "together, s"], lines)
