"""What methods are compared on: a teacher, prompts in words, a checker. Each bench is one value of `Subject`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline

from arcflow.comparison.config import Plan
from arcflow.config import Data, Model
from arcflow.families.loading import load_pipe
from arcflow.metrics.features import Features, Images, world_features
from arcflow.world import check
from arcflow.world.scene import SIZE, held_out, parse


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Functions, so that it costs nothing before it is asked, and other processes can be told. They are named ones of a
    module: others are not known there."""

    pipe: Callable[[Plan], DiffusionPipeline]
    size: int
    """Height and width of an image in pixels."""
    held_out: Callable[[int], list[str]]
    """So many prompts that no method has trained on."""
    captions: Callable[[Plan], Data]
    """Where the training prompts are."""
    right: Callable[[Images, Sequence[str]], list[bool]]
    """Which images show what their prompts say."""
    skill: Callable[[str], str]
    """What a prompt asks for: accuracy is told for each skill as well."""
    features: Callable[[], Features]
    """In which the images of one prompt differ."""
    to_real: Callable[[Images], float] | None = None
    """Distance of a set of images to real ones that the teacher has not seen, where there are any."""
    command: str = "arcflow compare"
    usual: Plan = field(default_factory=Plan)
    """The plan that the command has unless told."""


def _pipe(plan: Plan) -> DiffusionPipeline:
    return load_pipe(Model(base=plan.model))


def _captions(plan: Plan) -> Data:
    return Data(count=plan.prompts, held_out_count=1)


def _right(images: Images, prompts: Sequence[str]) -> list[bool]:
    return [check.is_right(image, text) for image, text in zip(images, prompts, strict=True)]


def _skill(text: str) -> str:
    return parse(text).skill


WORLD = Subject(
    pipe=_pipe,
    size=SIZE,
    held_out=held_out,
    captions=_captions,
    right=_right,
    skill=_skill,
    features=world_features,
)
"""The built-in world, which the recipes were made on."""
