"""The report: one file with everything in it, and an image whose plane belongs to the teacher."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from arcflow.evaluation.results import Evaluation, EvaluationAbout, Result
from arcflow.evaluation.side_by_side import ROWS, Tracks
from arcflow.reports.page import image_png
from arcflow.reports.side_by_side import curves_figure, path_figure, plane, write_report
from arcflow.sampling.generate import PARTS, Samples

PROMPTS = ["a <red> ring", "a square & a circle"]


def samples(nfe: int) -> Samples:
    images = np.random.default_rng(nfe).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)
    return Samples(images, torch.zeros(2, 4, 4), nfe, dict.fromkeys(PARTS, 0.25 * nfe))


def result(nfe: int) -> Result:
    return Result(
        nfe=nfe,
        seconds_per_image=0.375 * nfe,
        seconds=dict.fromkeys(PARTS, 0.125 * nfe),
        mse_to_teacher=1 / nfe,
        accuracy={"overall": 0.5, "counting": 0.25},
        prompts=2,
        seeds=1,
    )


ABOUT = EvaluationAbout(versions={}, python="3", device="x", threads=1, command="arcflow demo", adapter="world")


def way(bend: float = 0.5) -> Tracks:
    """A parabola in 20 dimensions, two chords beside it and two arcs on it."""
    axes = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(0))).Q.T

    def curve(start: float, end: float, points: int) -> torch.Tensor:
        t = torch.linspace(start, end, points)[:, None]
        return t * axes[0] + bend * t * (1 - t) * axes[1]

    chords = torch.stack([curve(0, 1, 2)[0], 0.5 * axes[0], axes[0] + 0.1 * axes[2]])
    images = {name: np.zeros((8, 8, 3), np.uint8) for name in ("teacher", "chords", "arcs")}
    return Tracks("a red ring", curve(0, 1, 51), chords, [curve(0, 0.3, 9), curve(0.3, 1, 9)], images)


LOG = [{"step": 0, "distance": 0.4, "euler_2": 0.5, "euler_4": 0.2, "euler_8": 0.1}]
LOG += [{"step": i, "loss": 1 / i, "teacher_ratio": min(1.0, (60 - i) / 20)} for i in range(1, 60)] + [
    {"step": 60, "distance": 0.1}
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    results = Evaluation(**{row: result(n) for row, (_, n) in ROWS.items()}, about=ABOUT)
    rows = {row: samples(n) for row, (_, n) in ROWS.items()}
    file = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_report(
        file, results, rows, PROMPTS, [way(), way(1.0)], LOG, rows=2, is_right=lambda image, prompt: "red" in prompt
    )
    return file.read_text("utf-8")


def test_a_student_is_shown_in_its_own_number_of_calls_beside_the_nearest_of_euler() -> None:
    rows = {row: result(n) for row, (_, n) in ROWS.items()}
    shown = {steps: Evaluation(**rows, about=dataclasses.replace(ABOUT, steps=steps)) for steps in (1, 2, 4, 8)}
    assert {steps: one.own for steps, one in shown.items()} == dict(
        zip((1, 2, 4, 8), ("arcflow_1", "arcflow_2", "arcflow_4", "arcflow_4"), strict=True)
    )
    assert [one.plain for one in shown.values()] == ["euler_2", "euler_2", "euler_4", "euler_4"]


@pytest.mark.slow
def test_the_report_is_one_file_that_fetches_nothing(page) -> None:
    assert "http" not in page and "<link" not in page and "<script" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 * len(ROWS) + 3
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"


@pytest.mark.slow
def test_the_report_shows_every_number_and_escapes_prompts(page) -> None:
    assert "a &lt;red&gt; ring" in page and "a square &amp; a circle" in page
    assert "0.0200" in page and "50.0%" in page and "25.0%" in page and "125.00" in page
    assert "arcflow demo" in page and page.count("wrong</span>") == len(ROWS)


def test_an_image_survives_as_png() -> None:
    image = samples(1).images[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image_png(image)))), image)


def test_the_plane_is_the_one_the_teacher_bends_in() -> None:
    path = way().teacher
    center, *axes = plane(path)
    flat = torch.stack([(path - center) @ axis for axis in axes], -1)
    rebuilt = center + flat @ torch.stack(axes)
    assert torch.allclose(rebuilt, path, atol=1e-5)
    assert flat[-1, 0] > flat[0, 0] and flat[25, 1] > flat[0, 1]


@pytest.mark.slow
def test_figures_are_images_of_some_size() -> None:
    for figure in (path_figure([way()]), path_figure([way()] * 3), curves_figure(LOG)):
        assert min(Image.open(io.BytesIO(figure)).size) > 400


@pytest.mark.slow
def test_a_prompt_is_no_formula() -> None:
    for prompt in (r"$\frac{$", "from $5 to $6"):
        assert path_figure([dataclasses.replace(way(), prompt=prompt)])


@pytest.mark.slow
def test_a_short_log_is_no_reason_to_fail() -> None:
    assert curves_figure([{"step": 0, "distance": 0.1}])
    assert curves_figure([])
