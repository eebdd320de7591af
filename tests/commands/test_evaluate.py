"""`arcflow evaluate` without a suite: one page with teacher, plain Euler and student, of any model."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from arcflow import cli, save_adapter, student
from arcflow.evaluation.results import Handful
from arcflow.families import loading
from arcflow.reports.page import LARGE, photo
from arcflow.sampling.generate import generate, stock_euler
from arcflow.system import records
from tests.support.pipelines import SIDE, fresh, perturb
from tests.support.suites import request


@pytest.fixture
def own(pristine, tmp_path, monkeypatch):
    """The folder of a tiny FLUX and of an adapter for it; only reading the model's weights is left out."""
    flux = fresh(pristine["flux"])
    flux.save_pretrained(tmp_path / "base")
    net = copy.deepcopy(flux.transformer)
    student.build(net, modes=4, rank=4, generator=torch.Generator().manual_seed(1))
    perturb(net, 0.02)
    save_adapter(net, tmp_path / "adapter")
    monkeypatch.setattr(loading, "load_pipe", lambda model: fresh(pristine["flux"]))
    return tmp_path


def evaluate(folder, *words: object) -> Handful:
    asked = ("--model", folder / "base", "--adapter", folder / "adapter", "--out", folder / "out")
    cli.main(["evaluate", *map(str, asked), "--height", str(SIDE), "--device", "cpu", *map(str, words)])
    return records.read(Handful, folder / "out" / "results.json")


@pytest.mark.slow
def test_any_model_gets_a_page_with_teacher_euler_and_student_from_one_noise(own, capsys, pristine) -> None:
    (own / "list.txt").write_text("a red cube\na blue ball\ntwo green balls\na red ball\n")
    found = evaluate(own, "--prompts", own / "list.txt", "--count", 2, "--images", 2, "--seed", 5)
    assert found.prompts == ["a red cube", "two green balls"] and found.seeds == [5, 6, 7, 8]
    assert [way.nfe for way in found.rows.values()] == [50, 2, 2]
    assert found.teacher.mse_to_teacher == 0 < found.student.mse_to_teacher
    assert found.student.low is not None and found.student.low <= found.student.mse_to_teacher

    flux = fresh(pristine["flux"])
    with stock_euler(flux):
        twin = generate(flux, ["two green balls"], [7], steps=2, height=SIDE, width=SIDE).images[0]
    assert np.array_equal(np.asarray(Image.open(own / "out" / "images" / "003-euler.png")), twin)
    assert len(list((own / "out" / "images").iterdir())) == 12

    page = (own / "out" / "report.html").read_text("utf-8")
    assert page.count("<figure") == 4 and page.count('class="under"') == 4 and "<script" not in page
    said = capsys.readouterr().out
    assert "plain Euler" in said and "report:" in said and "right" not in said


@pytest.mark.slow
def test_without_a_list_it_takes_a_few_built_in_prompts_and_of_one_there_is_no_interval(own, capsys) -> None:
    found = evaluate(own, "--count", 1)
    assert len(found.prompts) == 1 and found.student.low is None
    assert "[" not in capsys.readouterr().out.partition("report:")[0]


def test_the_command_is_one_and_says_which_options_go_together(tmp_path) -> None:
    with pytest.raises(ValueError, match="--clip: only with --suite"):
        request(model="m", adapter="a", clip="c").check()
    with pytest.raises(ValueError, match="--steps: the report of the small world.*--prompts FILE or --model"):
        request(steps=4).check()
    request(steps=4, prompts=tmp_path).check()
    request(model="m", adapter="a", steps=4, height=512).check()


def test_an_adapter_is_needed(own, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--model", str(own / "base"), "--adapter", "none", "--height", str(SIDE)])
    assert "no student to compare" in capsys.readouterr().err


def test_a_page_shows_large_images_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (LARGE + 8, 64, 3)).astype(np.uint8)
    assert photo(noise).startswith("data:image/jpeg") and photo(noise[:LARGE]).startswith("data:image/png")
