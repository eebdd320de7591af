"""The page of a training: made of its folder alone, at any time, with what is there."""

import json

import numpy as np
import pytest
from PIL import Image

from arcflow import config, recipes
from arcflow.reports import training
from arcflow.reports.training import MEASURED, beaten, measured_table, write_training

LOG = [{"step": 0, "distance": 0.4, "euler_2": 0.5, "euler_4": 0.2, "euler_8": 0.1}]
LOG += [{"step": step, "loss": 1 / step, "skipped": 0} for step in range(1, 60)]
LOG += [{"step": 60, "distance": 0.12}]


@pytest.fixture
def folder(tmp_path):
    """A run folder as a training leaves it."""
    settings = json.loads(config.to_json(recipes.world_quick())) | {"contents": {"prompts": "abc"}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "a <red> ring"}\n')
    (tmp_path / "pictures").mkdir()
    (tmp_path / "adapter").mkdir()
    Image.fromarray(np.zeros((128, 64, 3), np.uint8)).save(tmp_path / "pictures" / "000060.png")
    return tmp_path


def test_the_page_has_curves_images_numbers_settings_and_the_next_commands(folder) -> None:
    page = write_training(folder).read_text("utf-8")
    assert page.count("data:image/png;base64") == 2 and (folder / "curves.png").stat().st_size > 1000
    assert "a &lt;red&gt; ring" in page and "nearer than plain Euler in 4 calls" in page
    assert "arcflow evaluate --adapter" in page and "optim.iterations" in page and "abc" not in page
    assert "http" not in page and "<script" not in page


def test_it_is_written_without_matplotlib_and_of_a_run_that_has_only_begun(folder, monkeypatch) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    for part in (folder / "pictures" / "000060.png", folder / "held_out.jsonl"):
        part.unlink()
    (folder / "adapter").rmdir()
    page = write_training(folder).read_text("utf-8")
    assert "data:image" not in page and "What next" not in page and not (folder / "curves.png").exists()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert write_training(folder) is None


def test_a_student_is_held_against_plain_euler() -> None:
    euler = {2: 0.5, 4: 0.2, 8: 0.1}
    assert beaten(0.6, euler) == "farther than plain Euler in 2 calls"
    assert beaten(0.15, euler) == "nearer than plain Euler in 4 calls" and beaten(0.1, {}) == ""


def test_a_long_run_has_a_short_table_that_ends_with_its_last_line() -> None:
    table = measured_table([{"step": i, "distance": 1.0 / (i + 1), "distance_4": 0.5} for i in range(1000)])
    assert len(table.rows) <= MEASURED + 1 and table.rows[-1].cells[0].text == "999"
    assert table.head == ["iteration", "distance", "distance, steps 4"]
