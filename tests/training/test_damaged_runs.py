"""Run folders damaged at random: `python -m benchmarks.damaged_runs` is the long form."""

import pytest

from benchmarks import damaged_runs


@pytest.mark.slow
def test_a_damaged_run_folder_is_taken_up_rightly_or_refused_in_a_sentence():
    ends = damaged_runs.survey(len(damaged_runs.DAMAGES), seed=1)
    assert [f"{name}: {end}" for name, end in ends if end.startswith("WRONG")] == []
