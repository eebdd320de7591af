"""From numbers of images to a table: shares of few prompts are not certain, and few are said to be few."""

import pytest

from arcflow.evaluation.results import Distance, SuiteScore, told
from arcflow.evaluation.suites.suite import Item
from arcflow.evaluation.summary import summed_up
from arcflow.metrics.intervals import share_interval


def items(count: int) -> list[Item]:
    return [Item(i, f"{i}", "a", "even" if i % 2 == 0 else "odd") for i in range(count)]


def test_a_share_of_few_prompts_is_not_certain() -> None:
    scores = {f"{i}/0": 1.0 for i in range(8)}
    of_shares, of_scores = (summed_up(items(8), 1, scores, share=share) for share in (True, False))
    assert isinstance(of_shares, SuiteScore) and isinstance(of_scores, SuiteScore)
    assert (of_scores.low, of_scores.high) == (1.0, 1.0)
    assert (of_shares.low, of_shares.high) == pytest.approx(share_interval(1.0, 8)[1:])
    assert of_shares.category_mean and of_shares.category_mean.low == of_shares.low
    assert of_shares.categories and of_shares.categories["odd"].low == pytest.approx(share_interval(1.0, 4).low)
    right = scores | {"3/0": 0.0, "5/0": 0.0}
    some = summed_up(items(8), 1, right, share=True)
    assert isinstance(some, SuiteScore) and (some.low, some.high) == pytest.approx(share_interval(0.75, 8)[1:])


def test_several_images_of_a_prompt_count_as_one() -> None:
    scores = {f"{i}/{draw}": float(draw < i % 3) for i in range(9) for draw in range(2)}
    both = [summed_up(items(9), 2, scores, share=share) for share in (True, False)]
    assert both[0] == both[1]


def test_few_prompts_or_images_are_said_to_be_few() -> None:
    line = told(SuiteScore(value=0.5, low=0.2, high=0.8, prompts=7, better="higher"))
    assert line == "0.5000 [0.2000, 0.8000] (of 7 prompts, which are few)"
    assert "few" not in told(SuiteScore(value=0.5, low=0.2, high=0.8, prompts=30, better="higher"))
    assert told(Distance(value=1.5, pictures=400, reference=12, better="lower")).endswith(
        "of 12 images, which are few)"
    )
