"""The digits as a subject of the comparison, with every setting of the first bench."""

from pathlib import Path

from diffusers import DiffusionPipeline

from arcflow.comparison.config import Plan
from arcflow.comparison.subject import Subject
from arcflow.config import Data, Model
from arcflow.families.loading import load_pipe
from arcflow.metrics.features import Features
from benchmarks.digits import words
from benchmarks.digits.pictures import SIZE, distance_to_real, pixels, right

CAPTIONS = len(words.captions(10**6))

USUAL = Plan(model="out/digits/teacher", out="out/digits/compare", calls=(1, 2), prompts=CAPTIONS, device="cpu")


def _pipe(plan: Plan) -> DiffusionPipeline:
    if not (Path(plan.model) / "model_index.json").is_file():
        raise ValueError(
            f"no teacher in {plan.model}: expected a pipeline's folder; make it with `python -m benchmarks.digits "
            f"teacher`, or say where it is with --model"
        )
    return load_pipe(Model(base=plan.model))


def _captions(plan: Plan) -> Data:
    """The list that was saved with the teacher."""
    if plan.prompts != CAPTIONS:
        raise ValueError(
            f"captions is {plan.prompts}: expected {CAPTIONS}, for the list of the digits is read whole; leave it out"
        )
    return Data(prompts=str(Path(plan.model) / "captions.txt"), held_out_count=1, height=SIZE, width=SIZE)


def _skill(text: str) -> str:
    return words.NAMES[words.digit_of(text)]


def _features() -> Features:
    return pixels


DIGITS = Subject(
    pipe=_pipe,
    size=SIZE,
    held_out=words.held_out,
    captions=_captions,
    right=right,
    skill=_skill,
    features=_features,
    to_real=distance_to_real,
    command="python -m benchmarks.digits compare",
    usual=USUAL,
)
