"""Benchmarks by name, one a file."""

from arcflow.evaluation.suites.captions import COCO, HPSV2
from arcflow.evaluation.suites.dpg import DPG
from arcflow.evaluation.suites.geneval import GENEVAL
from arcflow.evaluation.suites.oneig import ONEIG
from arcflow.evaluation.suites.suite import WORLD

SUITES = {suite.name: suite for suite in (WORLD, GENEVAL, DPG, ONEIG, COCO, HPSV2)}
"""Every benchmark by its name."""
