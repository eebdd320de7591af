"""Walks that are kept: which iterations ask the teacher, what is drawn, and what a checkpoint holds of them."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from arcflow.config import Distill
from arcflow.distillation.kept import Kept, Walks, asked_before, asks
from arcflow.distillation.objective import Walk
from arcflow.distillation.walk import schedule
from arcflow.path import segments
from tests.support.pipelines import draws

CONFIG = Distill(steps=2, led=2, reuse=3, kept=4)


def kept(seed: int = 0, rows: int = 2) -> Kept:
    """Walks of two segments with numbers of their own."""
    generator = draws(seed)
    walks = []
    for segment in segments(2):
        x, end = torch.randn(2, rows, 4, generator=generator)
        states, targets = torch.randn(2, CONFIG.states, rows, 4, generator=generator)
        times = schedule(segment, rows, states=CONFIG.states, window=0.0, ratio=1.0, generator=generator)
        walks.append(Walk(x=x, times=times, targets=targets, states=states, end=end))
    mask = torch.rand(rows, 3, generator=generator) < 0.5
    return Kept(walks, {"text": torch.randn(rows, 3, generator=generator), "mask": mask, "img_ids": torch.ones(5, 3)})


@pytest.mark.parametrize("reuse", [1, 2, 3, 8])
@pytest.mark.parametrize("hold", [0, 1, 7, 10**9])
def test_iterations_that_ask_the_teacher_are_counted(reuse, hold):
    """One of `reuse` while the teacher leads, then every one."""
    config = Distill(reuse=reuse, hold=hold, decay=4)
    asked = [asks(step, config) for step in range(40)]
    assert [asked_before(step, config) for step in range(41)] == [0, *accumulate(map(int, asked))]
    assert all(asked[hold:]) and sum(asked[:hold]) == -(-min(hold, 40) // reuse)


def test_a_teacher_that_always_leads_is_asked_as_seldom_to_the_end():
    assert sum(asks(step, CONFIG) for step in range(300)) == 100


def test_the_newest_batches_are_kept_and_all_of_them_are_drawn():
    walks = Walks(CONFIG)
    for number in range(6):
        walks.add([kept(number)])
    newest = [batch[0].walks[0].x for batch in walks.batches]
    assert [bool((x == kept(number).walks[0].x).all()) for number, x in enumerate(newest, 2)] == [True] * 4
    drawn = {id(walks.draw(draws(seed))) for seed in range(60)}
    assert drawn == {id(batch) for batch in walks.batches}


def test_a_checkpoint_gives_every_number_back():
    walks = Walks(CONFIG, "0-1")
    for number in range(3):
        walks.add([kept(10 * number), kept(10 * number + 1, rows=1)])
    there = Walks(CONFIG, "0-1")
    there.load(walks.tensors())
    assert there.tensors().keys() == walks.tensors().keys()
    assert all(torch.equal(value, there.tensors()[name]) for name, value in walks.tensors().items())
    for one, other in zip(walks.batches, there.batches, strict=True):
        assert [walk.times.segment for walk in one[1].walks] == [walk.times.segment for walk in other[1].walks]
        assert other[0].cond["mask"].dtype == torch.bool


def test_the_estimate_of_their_size_is_right():
    config = replace(CONFIG, kept=1)
    walks, piece = Walks(config), kept()
    walks.add([piece])
    held = [v for name, v in walks.tensors().items() if not name.endswith(("tau", "tau_next", "img_ids"))]
    assert walks.size(piece.walks[0].x, piece.cond, 2) == sum(value.nbytes for value in held)
