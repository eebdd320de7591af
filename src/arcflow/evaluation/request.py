"""What `arcflow evaluate` is asked for; no torch, for the command line makes its options of it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction

from arcflow.config import check
from arcflow.evaluation.suites import SUITES
from arcflow.sampling.options import Drawing, Fleet, Machine, ModelAndAdapter, unset

if TYPE_CHECKING:
    SuiteName = str
else:
    SuiteName = Literal[tuple(SUITES)]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A student beside its teacher: on the built-in world, whose checker counts what is right, or with any model on a
    handful of prompts; with `suite` the images of a benchmark, scored."""

    suite: Annotated[SuiteName | None, unset(f"{{{','.join(SUITES)}}}")] = None
    """A benchmark; all but the built-in "world" read their own prompt file. What is there already is neither drawn nor
    scored again. Options marked * need it, and so do those of Ray."""
    count: Annotated[int | None, unset("INT")] = None
    """Take this many prompts, evenly spread over the list: by default 8, of a benchmark all; of the built-in world the
    first, by default 384."""
    images: Annotated[int | None, unset("INT")] = None
    """Images of each prompt; by default what a benchmark asks for, else 1."""
    seed: Annotated[int | None, unset("INT")] = None
    """Seed of the first image's noise, by default 0, or that of the held-out prompts; a benchmark's are fixed."""
    out: Annotated[Path | None, unset("PATH")] = None
    """Folder for results.json and the images or the report, by default out/evaluate or out/suite; one for each model,
    adapter and number of steps."""
    prompts: Annotated[Path | None, unset("PATH")] = None
    """A file of prompts, as `sample` takes it; by default some of a built-in list. With --suite the benchmark's own
    file or folder (docs/evaluation.md says which, and from where)."""
    complete: bool = True
    """* The prompts must be all there; with --no-complete a part of them will do, and the results say so."""
    reference: Annotated[Path | None, unset("PATH")] = None
    """* Images to compare with: another folder of this command (the teacher's), or any folder of images."""
    features: UseAppendAction[tuple[str, ...]] = ()
    """* Network whose features are compared: world, dino, inception=FILE, patch=FILE (inception on full resolution);
    may be given several times."""
    clip: Annotated[str | None, unset("STR")] = None
    """* CLIP network for the score of image and prompt, say openai/clip-vit-large-patch14-336."""
    lpips: bool = False
    """* LPIPS to the same image of --reference (needs arcflow[eval])."""
    scorer: UseAppendAction[tuple[str, ...]] = ()
    """* NAME='COMMAND with {manifest} and {out}': a scorer in an environment of its own; may be given several times."""
    answers: UseAppendAction[tuple[str, ...]] = ()
    """* NAME=FILE: what the benchmark's own scorer wrote, read into the results; may be given several times."""
    name: str = "arcflow"
    """* Name of the model where the official scorer wants one (OneIG-Bench)."""
    subject: Annotated[ModelAndAdapter, OmitArgPrefixes] = ModelAndAdapter()
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()
    machine: Annotated[Machine, OmitArgPrefixes] = Machine()
    fleet: Annotated[Fleet, OmitArgPrefixes] = Fleet()

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("out/suite" if self.suite else "out/evaluate")

    def _given(self) -> list[str]:
        """Names of the options that are not as they are by default."""
        groups = (self, self.subject, self.drawing, self.machine, self.fleet)
        return [
            one.name
            for group in groups
            for one in fields(group)
            if not isinstance(one.default, GROUPS) and getattr(group, one.name) != one.default
        ]

    def check(self) -> None:
        """Raises a ValueError if an option is given that the others make meaningless."""
        for name, least in (("count", 1), ("images", 1), ("seed", -(2**63))):
            value = getattr(self, name)
            check(value is None or least <= value < 2**63, f"--{name}", value, f"{least} or more", "leave it out")
        given = self._given()
        if self.suite:
            if "seed" in given:
                raise ValueError(
                    "--seed: the noises of a benchmark's images are fixed, so that all models are alike; leave it out"
                )
            frames = self.drawing.frames
            check(frames is None, "--frames", frames, "none: a benchmark is of images", "leave it out")
            return
        if scored := [name for name in given if name in SCORED]:
            told = ", ".join(f"--{name.replace('_', '-')}" for name in scored)
            raise ValueError(f"{told}: only with --suite NAME ({', '.join(SUITES)}); say it, or leave that out")
        drawn = [name for name in given if name in DRAWN]
        if drawn and not self.handful:
            told = ", ".join(f"--{name.replace('_', '-')}" for name in drawn)
            raise ValueError(
                f"{told}: the report of the small world is always drawn alike; expected --prompts FILE or --model with "
                f"it, or --suite NAME ({', '.join(SUITES)})"
            )

    @property
    def handful(self) -> bool:
        """Whether it is a handful of prompts that nobody checks."""
        return not self.suite and (self.subject.model != "world" or self.prompts is not None)


GROUPS = (ModelAndAdapter, Drawing, Machine, Fleet)
"""Options that commands which draw have in common."""


SCORED = (
    *("complete", "reference", "features", "clip", "lpips", "scorer", "answers", "name"),
    *("ray", "address", "workers", "cpus", "gpus"),
)
"""Options that need a suite."""

DRAWN = ("steps", "height", "width", "frames", "guidance", "negative_prompt", "true_cfg", "batch", "dtype", "fit")
"""Options that say how images are drawn, which the report of the small world does not leave open."""
