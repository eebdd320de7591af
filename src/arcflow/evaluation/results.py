"""The numbers of `arcflow evaluate`: teacher, plain Euler and student, one row for each way to sample.

An `Evaluation` is a file of JSON, which `system.records` reads and writes.
"""

from dataclasses import dataclass, fields

from arcflow.system.packages import About


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way to sample, over all pictures."""

    nfe: int
    """Calls of the transformer for a picture, counted."""
    seconds_per_image: float
    seconds: dict[str, float]
    """The same by part of the pipeline."""
    mse_to_teacher: float
    """Mean squared difference of the final latents to the reference's from the same noise."""
    accuracy: dict[str, float]
    """Share of pictures that show what their prompts say: "overall", and one entry for each skill."""
    prompts: int
    seeds: int
    """Pictures of each prompt."""

    @property
    def right(self) -> float:
        """Share of right pictures over all skills."""
        return self.accuracy["overall"]

    @property
    def weakest(self) -> float:
        """Share of right pictures of the skill that has the fewest."""
        return min(share for skill, share in self.accuracy.items() if skill != "overall")

    @property
    def transformer(self) -> float:
        """Seconds of the transformer for a picture."""
        return self.seconds["transformer"]


@dataclass(frozen=True, kw_only=True)
class Made(About):
    """What an evaluation was made with."""

    adapter: str


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
    about: Made

    @property
    def rows(self) -> dict[str, Result]:
        """All of them by name, in the order of the tables."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "about"}
