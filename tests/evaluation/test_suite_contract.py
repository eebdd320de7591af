"""What every benchmark keeps, whoever adds one: a reader, a layout, answers, numbers that go round."""

import json
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from arcflow.evaluation import images, summary
from arcflow.evaluation.results import SuiteScore
from arcflow.evaluation.suites import SUITES
from arcflow.evaluation.suites.suite import Item, read_items
from arcflow.system import records
from tests.support.suites import answers_file, prompt_file

FROM_FILES = [name for name in SUITES if SUITES[name].file]
BUILT_IN = 64
"""As many prompts of a suite without a file: all of them take seconds."""
ANSWERED = [name for name in SUITES if SUITES[name].answers]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Each suite's prompts, read once."""

    @cache
    def read(name: str) -> list[Item]:
        if not SUITES[name].file:
            return read_items(SUITES[name], None, count=BUILT_IN)
        return read_items(SUITES[name], prompt_file(name, tmp_path_factory.mktemp(name)), complete=False)

    return read


@pytest.mark.parametrize("name", SUITES)
def test_prompts_have_their_place_an_id_of_their_own_and_a_known_category(name, items) -> None:
    found, suite = items(name), SUITES[name]
    assert found and [item.number for item in found] == list(range(len(found)))
    assert len({item.image(draw) for item in found for draw in range(suite.images)}) == len(found) * suite.images
    known = {category for counts in suite.counts for category in counts}
    assert not suite.counts or {item.category for item in found} <= known


@pytest.mark.parametrize("name", SUITES)
def test_noise_is_of_suite_place_and_draw_alone(name, items) -> None:
    suite, found = SUITES[name], items(name)
    seeds = [suite.seed(item, draw) for item in found for draw in range(2)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [suite.seed(Item(item.number, "x", "y"), draw) for item in found for draw in range(2)]


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_file_that_is_none_says_what_is_expected_and_where_it_is(name, tmp_path) -> None:
    with pytest.raises(ValueError, match="nowhere") as error:
        read_items(SUITES[name], tmp_path / "nowhere")
    assert SUITES[name].file in str(error.value) and SUITES[name].source in str(error.value)


@pytest.mark.parametrize("name", SUITES)
def test_images_are_laid_out_for_whole_prompts_only_and_only_once(name, items, tmp_path) -> None:
    suite, (first, second, *_) = SUITES[name], items(name)
    folder = tmp_path / "out"
    (folder / "pictures").mkdir(parents=True)
    for draw in range(suite.images):
        Image.new("RGB", (4, 4)).save(folder / "pictures" / f"{first.number:05d}-{draw}.png")

    def laid() -> dict[Path, int]:
        images.lay_out(folder, suite, [first, second], suite.images, "mine")
        return {path: path.stat().st_mtime_ns for path in (folder / "official").rglob("*") if path.is_file()}

    once = laid()
    assert bool(once) == bool(suite.layout) and laid() == once
    for path in once:
        if path.suffix in (".png", ".jpg", ".webp"):
            with Image.open(path) as image:
                assert image.mode == "RGB"


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_are_about_its_own_prompts_and_become_a_number_that_goes_round(name, items, tmp_path) -> None:
    found, suite = items(name), SUITES[name]
    scores = suite.answers(answers_file(name, tmp_path), found, "mine")
    own = {item.id for item in found} | {item.image(draw) for item in found for draw in range(suite.images)}
    assert scores and scores.keys() <= own
    metric = summary.summed_up(found, suite.images, scores)
    assert isinstance(metric, SuiteScore) and 0 <= metric.value <= 1 and 1 <= metric.prompts <= len(found)
    assert records.record(SuiteScore, json.loads(json.dumps(records.plain(metric)))) == metric
