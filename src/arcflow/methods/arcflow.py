"""ArcFlow, and linear distillation: ArcFlow with a single mode, so that every step is a straight line.

A mixture of one mode has one constant velocity, pulled to the teacher's at states all over the step. What ArcFlow
gains over this, it gains by its curve. Source: arXiv 2602.09014."""

from functools import partial

from arcflow import paper
from arcflow.distillation.matching import matching
from arcflow.distillation.method import Method

ARCFLOW = Method(name="arcflow", title="ArcFlow", paper="2602.09014", modes=paper.MODES, objective=matching)

LINEAR = Method(
    name="linear",
    title="Linear distillation",
    paper="2602.09014",
    modes=1,
    objective=partial(matching, modes_drop=False),
)
