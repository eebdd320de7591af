"""What `arcflow evaluate` is asked for; no torch, for the command line makes its options of it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import UseAppendAction

from arcflow.config import Device, Dtype
from arcflow.evaluation.suites import SUITES

if TYPE_CHECKING:
    SuiteName = str
else:
    SuiteName = Literal[tuple(SUITES)]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A student beside its teacher on the built-in world; with `suite` the pictures of a benchmark, scored."""

    suite: SuiteName | None = None
    """A benchmark; all but the built-in "world" read their own prompt file. What is there already is neither drawn nor
    scored again. Options marked * need it."""
    adapter: str = "world"
    """Adapter: "world" for the one shipped for the shipped teacher, or a folder; with --suite also Hub
    "owner/name:subfolder", and "none" for the teacher itself in plain Euler steps."""
    count: int | None = None
    """Take this many prompts, evenly spread over the list; of the built-in world the first, by default 384."""
    seeds: int = 1
    """Pictures of each prompt, where no --suite is given."""
    out: Path | None = None
    """Folder for results.json and the pictures or the report, by default out/evaluate or out/suite; one for each model,
    adapter and number of steps."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    prompts: Path | None = None
    """* The benchmark's own prompt file or folder (docs/evaluation.md says which, and from where)."""
    complete: bool = True
    """* The prompts must be all there; with --no-complete a part of them will do, and the results say so."""
    pictures: int | None = None
    """* Pictures of each prompt; by default what the benchmark asks for."""
    model: str = "world"
    """* Teacher: "world" for the shipped small one, a diffusers pipeline folder, or a Hub id."""
    steps: int = 2
    """* Network calls per image."""
    height: int | None = None
    """* Height in pixels; by default 64 for the shipped teacher, else 1024."""
    width: int | None = None
    """* Width in pixels; by default the height."""
    guidance: float | None = None
    """* Guidance; by default what the adapter was distilled with, or the model is meant for."""
    reference: Path | None = None
    """* Pictures to compare with: another folder of this command (the teacher's), or any folder of pictures."""
    features: UseAppendAction[tuple[str, ...]] = ()
    """* Network whose features are compared: world, dino, inception=FILE, patch=FILE (inception on full resolution);
    may be given several times."""
    clip: str | None = None
    """* CLIP network for the score of picture and prompt, say openai/clip-vit-large-patch14-336."""
    lpips: bool = False
    """* LPIPS to the same picture of --reference (needs arcflow[eval])."""
    scorer: UseAppendAction[tuple[str, ...]] = ()
    """* NAME='COMMAND with {manifest} and {out}': a scorer in an environment of its own; may be given several times."""
    answers: UseAppendAction[tuple[str, ...]] = ()
    """* NAME=FILE: what the benchmark's own scorer wrote, read into the results; may be given several times."""
    name: str = "arcflow"
    """* Name of the model where the official scorer wants one (OneIG-Bench)."""
    batch: int = 8
    """* Images at a time."""
    dtype: Dtype | Literal["auto"] = "auto"
    """* Precision of the weights; auto takes bfloat16 on cuda, else float32."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("out/suite" if self.suite else "out/evaluate")

    def check(self) -> None:
        """Raises a ValueError if an option is given that the others make meaningless."""
        strange = ["seeds"] if self.suite else [one.name for one in fields(self) if one.name not in PLAIN]
        given = [one.name for one in fields(self) if one.name in strange and getattr(self, one.name) != one.default]
        if given and self.suite:
            raise ValueError(
                "--seeds is for the comparison without --suite; say --pictures to draw a prompt more often"
            )
        if given:
            told = ", ".join(f"--{name}" for name in given)
            raise ValueError(
                f"{told}: only with --suite, for without one the shipped small model is compared; "
                f"say --suite {' or '.join(SUITES)}, or leave it out"
            )


PLAIN = ("suite", "adapter", "count", "seeds", "out", "device")
"""Options that need no suite."""
