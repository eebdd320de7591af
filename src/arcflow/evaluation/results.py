"""The numbers of `arcflow evaluate`: of teacher, plain Euler and student side by side, and of a suite.

An `Evaluation` and `SuiteResults` are files of JSON, `results.json`, which `system.records` reads and writes.
"""

from dataclasses import dataclass, fields
from typing import Literal

from arcflow.system.packages import About


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way to sample, over all images."""

    nfe: int
    """Calls of the transformer for an image, counted."""
    seconds_per_image: float
    seconds: dict[str, float]
    """The same by part of the pipeline."""
    mse_to_teacher: float
    """Mean squared difference of the final latents to the reference's from the same noise."""
    accuracy: dict[str, float]
    """Share of images that show what their prompts say: "overall", and one entry for each skill."""
    prompts: int
    seeds: int
    """Images of each prompt."""

    @property
    def right(self) -> float:
        """Share of right images over all skills."""
        return self.accuracy["overall"]

    @property
    def weakest(self) -> float:
        """Share of right images of the skill that has the fewest."""
        return min(share for skill, share in self.accuracy.items() if skill != "overall")

    @property
    def transformer(self) -> float:
        """Seconds of the transformer for an image."""
        return self.seconds["transformer"]


@dataclass(frozen=True, kw_only=True)
class EvaluationAbout(About):
    """What an evaluation was made with."""

    adapter: str
    steps: int = 2
    """The student's own number of steps."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every way to sample, from the same prompts and noise."""

    teacher_50: Result
    euler_2: Result
    euler_4: Result
    euler_8: Result
    arcflow_1: Result
    arcflow_2: Result
    arcflow_4: Result
    about: EvaluationAbout

    @property
    def rows(self) -> dict[str, Result]:
        """All of them by name, in the order of the tables."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "about"}

    @property
    def own(self) -> str:
        """Name of the student's row in its own number of steps, or in the nearest one that was drawn."""
        return self._nearest("arcflow", self.about.steps)

    @property
    def plain(self) -> str:
        """Name of plain Euler's row that stands beside it, in the nearest number of calls."""
        return self._nearest("euler", self.rows[self.own].nfe)

    def _nearest(self, way: str, steps: int) -> str:
        drawn = [name for name in self.rows if name.startswith(way)]
        return min(drawn, key=lambda name: abs(self.rows[name].nfe - steps))


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to sample, over images that nobody checks."""

    nfe: int
    """Calls of the transformer for an image, counted."""
    seconds_per_image: float
    seconds: dict[str, float]
    """The same by part of the pipeline."""
    mse_to_teacher: float
    """Mean squared difference of the final latents to the teacher's from the same noise."""
    low: float | None
    """Ends of its 95 % interval over the prompts; of one prompt there is none."""
    high: float | None

    @property
    def transformer(self) -> float:
        """Seconds of the transformer for an image."""
        return self.seconds["transformer"]


@dataclass(frozen=True, kw_only=True)
class Handful:
    """Teacher, plain Euler and student of any model, from the same prompts and noise."""

    teacher: Way
    euler: Way
    student: Way
    prompts: list[str]
    seeds: list[int]
    """The seeds of the images, prompt by prompt."""
    height: int
    width: int
    frames: int
    guidance: float | None
    model: str
    about: EvaluationAbout

    @property
    def rows(self) -> dict[str, Way]:
        """All of them by name, in the order of the tables."""
        return {"teacher": self.teacher, "euler": self.euler, "student": self.student}


Better = Literal["higher", "lower", "", "as the reference", "close to 1"]
"""Which way a number is better; empty where we do not know."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts, and the ends of its 95 % interval; of one prompt there is none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class CategoryScore(Estimate):
    """A mean over the prompts of a category."""

    prompts: int


@dataclass(frozen=True, kw_only=True)
class SuiteScore(CategoryScore):
    """A mean over the prompts of a suite."""

    better: Better
    category_mean: Estimate | None = None
    """The mean of the categories' means; None where there are no categories."""
    categories: dict[str, CategoryScore] | None = None


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A number of two sets of images."""

    value: float
    pictures: int
    reference: int
    better: Better


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """A number that cannot be had, and why: too few images, for example."""

    value: None
    why: str
    prompts: int | None = None
    pictures: int | None = None
    reference: int | None = None
    better: Better


Metric = SuiteScore | Distance | Lacking


FEW = 30
"""Prompts or images, below which a number says that they are few."""


def told(metric: Metric) -> str:
    """One line about a metric: its value and interval, or why there is none, and whether it is of few prompts."""
    if isinstance(metric, Lacking):
        return f"none: {metric.why}"
    count, what = (
        (metric.prompts, "prompts")
        if isinstance(metric, SuiteScore)
        else (min(metric.pictures, metric.reference), "images")
    )
    few = f" (of {count} {what}, which are few)" if count < FEW else ""
    if isinstance(metric, SuiteScore) and metric.low is not None:
        return f"{metric.value:.4f} [{metric.low:.4f}, {metric.high:.4f}]{few}"
    return f"{metric.value:.4f}{few}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the images of a folder are of: `suite.json`."""

    suite: str
    prompts: str
    """A digest of the list, or "built in"."""
    height: int
    width: int
    guidance: float | None
    model: str
    adapter: str
    steps: int
    weights: str
    """A digest of the adapter's files."""
    dtype: str = ""
    """Precision of the base; empty in folders of before."""
    base: str = ""
    """A digest of the base's transformer, by its files; empty if they are not on this machine."""
    negative_prompt: str | None = None
    true_cfg: float | None = None
    """Scale of a second call."""
    teacher_lora: str | None = None
    lora_weights: str = ""
    """A digest of that LoRA's files."""
    quantize: str = "none"
    """How the base is stored, where that is shorter."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time for an image."""

    generation: float
    evaluation: dict[str, float]
    """Seconds of each stage of the evaluation."""
    share: float
    """Time of the evaluation over that of the generation; scorers in their own environment are not counted."""


@dataclass(frozen=True, kw_only=True)
class SuiteResults:
    """All numbers of a suite: `results.json`."""

    suite: str
    paper: str
    complete: bool
    """Whether it is the whole benchmark."""
    settings: Settings
    prompts: int
    pictures: int
    metrics: dict[str, Metric]
    seconds: Seconds
    about: About
