"""Random orders of what users do with a pipeline: `python -m benchmarks.gestures` is the long form."""

import pytest

from benchmarks import gestures
from tests.support.pipelines import PIPELINES


@pytest.mark.slow
@pytest.mark.parametrize("family", list(PIPELINES))
def test_whatever_was_done_in_whatever_order_the_image_is_the_right_one(family):
    assert gestures.survey(family, count=3, length=10, seed=0) == []
