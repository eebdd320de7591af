"""What `arcflow evaluate` is asked for; no torch, for the command line makes its options of it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, UseAppendAction

from arcflow.config import Device, Dtype, Fit, check
from arcflow.evaluation.suites import SUITES
from arcflow.sampling.options import unset

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
    scored again. Options marked * need it."""
    adapter: str = "world"
    """Adapter folder or Hub "owner/name:subfolder"; "world" for the one shipped for the shipped teacher; with --suite
    also "none", for the teacher itself in plain Euler steps."""
    teacher_lora: Annotated[str | None, unset("STR")] = None
    """A LoRA on the teacher: file, folder or Hub id. An adapter that was distilled with one asks for it; "none" draws
    without."""
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
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    fuse: FlagCreatePairsOff[bool] = False
    """Add the adapter's LoRA into copies of the weights: faster, for their memory; by default where there is room."""
    no_fuse: FlagCreatePairsOff[bool] = False
    """Leave the weights as they are."""
    prompts: Annotated[Path | None, unset("PATH")] = None
    """A file of prompts, as `sample` takes it; by default some of a built-in list. With --suite the benchmark's own
    file or folder (docs/evaluation.md says which, and from where)."""
    complete: bool = True
    """* The prompts must be all there; with --no-complete a part of them will do, and the results say so."""
    model: str = "world"
    """Teacher: "world" for the shipped small one, a diffusers pipeline folder, or a Hub id."""
    steps: Annotated[int | None, unset("INT")] = None
    """Network calls per image; by default what the adapter was made for. The teacher beside it has 50."""
    height: Annotated[int | None, unset("INT")] = None
    """Height in pixels; by default 64 for the shipped teacher, else 1024."""
    width: Annotated[int | None, unset("INT")] = None
    """Width in pixels; by default the height."""
    guidance: Annotated[float | None, unset("FLOAT")] = None
    """Guidance; by default what the adapter was distilled with, or the model is meant for."""
    negative_prompt: Annotated[str | None, unset("STR")] = None
    """Text to guide away from, by a second call in each step."""
    true_cfg: Annotated[float | None, unset("FLOAT")] = None
    """Scale of that second call; by default 4 where there is a negative prompt, else a student makes none."""
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
    batch: int = 8
    """Images at a time."""
    dtype: Dtype | Literal["auto"] = "auto"
    """Precision of the weights; auto takes bfloat16 on cuda, else float32."""
    ray: FlagCreatePairsOff[bool] = False
    """* Share pictures, numbers and scorers out to workers of Ray, which see the same folder (needs arcflow[ray])."""
    address: Annotated[str | None, unset("HOST:PORT")] = None
    """* With --ray: a running cluster, or "auto"; by default Ray is started here, for this command alone."""
    workers: Annotated[int | None, unset("INT")] = None
    """* With --ray: processes, each with the model; by default as many as there is room for."""
    cpus: float = 1.0
    """* With --ray: CPUs of each of them."""
    gpus: Annotated[float | None, unset("FLOAT")] = None
    """* With --ray: GPUs of each; by default one where the cluster has any."""
    fit: Fit = "auto"
    """How the model is fitted to the card: whole, one part at a time, in 8 or 4 bits, or layer by layer; auto does
    what `arcflow doctor` advises."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("out/suite" if self.suite else "out/evaluate")

    def check(self) -> None:
        """Raises a ValueError if an option is given that the others make meaningless."""
        for name, least in (("count", 1), ("images", 1), ("seed", -(2**63))):
            value = getattr(self, name)
            check(value is None or least <= value < 2**63, f"--{name}", value, f"{least} or more", "leave it out")
        given = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
        if self.suite:
            if "seed" in given:
                raise ValueError(
                    "--seed: the noises of a benchmark's images are fixed, so that all models are alike; leave it out"
                )
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
        return not self.suite and (self.model != "world" or self.prompts is not None)


SCORED = (
    *("complete", "reference", "features", "clip", "lpips", "scorer", "answers", "name"),
    *("ray", "address", "workers", "cpus", "gpus"),
)
"""Options that need a suite."""

DRAWN = ("steps", "height", "width", "guidance", "negative_prompt", "true_cfg", "batch", "dtype", "fit")
"""Options that say how images are drawn, which the report of the small world does not leave open."""
