"""The report of a comparison shows every entrant, ranked, with what is more than noise."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow.comparison.results import (
    Apart,
    Comparison,
    ComparisonAbout,
    EntrantRow,
    Mean,
    Means,
    SeedMean,
    ranked,
    verdict,
)
from arcflow.metrics.intervals import seed_difference, seed_interval
from arcflow.reports.comparison import (
    GAP,
    LINES,
    calls_figure,
    cost_figure,
    figure_colors,
    markdown_ranking,
    spread_labels,
    write_ranking,
)
from arcflow.system import records
from arcflow.world.scene import held_out

DISTANCES = {"arcflow": [0.10, 0.11, 0.12], "linear": [0.20, 0.21, 0.22], "near": [0.115, 0.12, 0.10], "euler": [0.3]}


def means(name, scale=1.0):
    values = [scale * value for value in DISTANCES[name]]
    first = [scale * value for value in DISTANCES["arcflow"]]

    def around(numbers):
        if len(numbers) == 1:
            return SeedMean(mean=numbers[0], low=None, high=None, seeds=numbers)
        return SeedMean(**seed_interval(numbers)._asdict(), seeds=numbers)

    return Means(
        distance=around(values),
        accuracy=around([1 - value for value in values]),
        diversity=around(values),
        skills={"counting": 0.5, "position": 0.75},
        curve=[(10.0, 0.5), (20.0, values[0])] if len(values) > 1 else [],
        broken=0,
        pictures=[f"{name}/2-0"],
        less_first=Apart(distance=Mean(**seed_difference(values, first)._asdict())),
    )


@pytest.fixture
def results():
    rows = {
        name: EntrantRow(
            title=name.title(),
            trained=int(len(values) > 1),
            second_network=name == "near",
            calls={1: means(name, 2.0), 2: means(name)},
        )
        for name, values in DISTANCES.items()
    }
    about = {"versions": {"torch": "2"}, "python": "3", "device": "x", "threads": 2, "command": "arcflow compare"}
    made = ComparisonAbout(**about, budget=7, seeds=3, count=4, batch=1, prompts=1)
    return Comparison(rows=rows, first="arcflow", about=made)


def test_entrants_are_ranked_by_distance_and_told_from_noise(results):
    assert ranked(results.rows, 2) == ["arcflow", "near", "linear", "euler"]
    told = {name: verdict(row.calls[2].less_first.distance) for name, row in results.rows.items()}
    assert told == {"arcflow": "same", "near": "same", "linear": "higher", "euler": "higher"}


@pytest.mark.slow
def test_the_report_is_one_file_with_the_images_that_are_there(results, tmp_path):
    strip = np.zeros((64, 4 * 64, 3), np.uint8)
    (tmp_path / "runs" / "linear").mkdir(parents=True)
    for path in (tmp_path / "teacher.png", tmp_path / "runs" / "linear" / "2-0-2.png"):
        Image.fromarray(strip).save(path)
    page = write_ranking(tmp_path / "methods.html", results, tmp_path).read_text()
    assert page.count("data:image/png;base64") == 2 + 2 * 4  # two figures, two strips of four
    assert all(page.count(f"<figcaption>{text}</figcaption>") == 1 for text in held_out(4))
    assert page.index("teacher<br>50 calls") < page.index("Linear<br>2 calls")
    assert "Near, second network" in page and "0.2100 \u00b1 0.0248" in page and "7 forward-equivalents" in page


@pytest.mark.slow
def test_the_figures_are_images(results):
    for figure in (calls_figure(results.rows, results.first), cost_figure(results.rows, 2, results.first)):
        assert min(Image.open(io.BytesIO(figure)).size) > 300


def test_the_markdown_has_a_table_for_each_number_of_calls(results):
    text = markdown_ranking(results)
    assert text.startswith("1 call:") and "\n2 calls:\n" in text
    assert "| **Arcflow** | 0.1100 &plusmn; 0.0248 | 89.0% &plusmn; 2.5% | 0.11 &plusmn; 0.02 | 50% |" in text


def test_a_figure_has_the_first_euler_and_the_nearest_and_no_more_than_can_be_told_apart():
    results = records.read(Comparison, Path(__file__).parents[2] / "benchmarks" / "results" / "methods.json")
    names = figure_colors(results.rows, results.first)
    assert len(names) == LINES < len(results.rows) and {results.first, "euler"} <= names.keys()


def test_labels_stand_apart_and_in_the_order_of_their_lines():
    heights = [0.95, 0.96, 0.2, 0.94, 0.955]
    places = spread_labels(heights)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    gaps = [places[there] - places[here] for here, there in itertools.pairwise(order)]
    assert min(gaps) >= GAP - 1e-9 and max(places) <= 1.0
