"""`arcflow evaluate --suite NAME`: draw a benchmark's pictures, score them, write results.json; resumable."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import UseAppendAction

from arcflow import __version__, config
from arcflow.evaluation.suites import SUITES

if TYPE_CHECKING:
    SuiteName = str
else:
    SuiteName = tyro.extras.literal_type_from_choices(list(SUITES))


def asked(words: Sequence[str]) -> bool:
    """Whether the words of a command line ask for a suite, and not for the comparison that `evaluate` is without."""
    return words[:1] == ["evaluate"] and any(word.split("=")[0] == "--suite" for word in words)


@dataclass(frozen=True, kw_only=True)
class EvaluateSuite:
    """Draw the pictures of a benchmark and score them; what is there already is neither drawn nor scored again."""

    suite: SuiteName
    """Which benchmark; all but the built-in "world" read their own prompt file."""
    prompts: Path | None = None
    """The benchmark's own prompt file or folder (docs/evaluation.md says which, and from where)."""
    complete: bool = True
    """The prompts must be all there; with --no-complete a part of them will do, and the results say so."""
    count: int | None = None
    """Take only so many prompts, evenly spread over the list; of "world" the first, by default 384."""
    pictures: int | None = None
    """Pictures of each prompt; by default what the benchmark asks for."""
    model: str = "world"
    """Teacher: "world" for the shipped small one, a diffusers pipeline folder, or a Hub id."""
    adapter: str = "world"
    """Adapter folder or Hub "owner/name:subfolder"; "world" for the one shipped for the shipped teacher, "none" for the
    teacher itself in plain Euler steps."""
    steps: int = 2
    """Network calls per image."""
    height: int | None = None
    """Height in pixels; by default 64 for the shipped teacher, else 1024."""
    width: int | None = None
    """Width in pixels; by default the height."""
    guidance: float | None = None
    """Guidance; by default what the adapter was distilled with, or the model is meant for."""
    reference: Path | None = None
    """Pictures to compare with: another folder of this command (the teacher's), or any folder of pictures."""
    features: UseAppendAction[tuple[str, ...]] = ()
    """Network whose features are compared: world, dino, inception=FILE, patch=FILE (inception on full resolution); may
    be given several times."""
    clip: str | None = None
    """CLIP network for the score of picture and prompt, say openai/clip-vit-large-patch14-336."""
    lpips: bool = False
    """LPIPS to the same picture of --reference (needs arcflow[eval])."""
    scorer: UseAppendAction[tuple[str, ...]] = ()
    """NAME='COMMAND with {manifest} and {out}': a scorer in an environment of its own; may be given several times."""
    answers: UseAppendAction[tuple[str, ...]] = ()
    """NAME=FILE: what the benchmark's own scorer wrote, read into the results; may be given several times."""
    name: str = "arcflow"
    """Name of the model where the official scorer wants one (OneIG-Bench)."""
    out: Path = Path("out/suite")
    """Folder for pictures, scores and results.json; one for each model, adapter and number of steps."""
    batch: int = 8
    """Images at a time."""
    device: config.Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: config.Dtype | Literal["auto"] = "auto"
    """Precision of the weights; auto takes bfloat16 on cuda, else float32."""

    def run(self) -> None:
        from arcflow.evaluation.suite_run import plan
        from arcflow.sampling.folder import share_of_work
        from arcflow.sampling.open import adapter_of, check_drawing, open_pipe, open_student, size_of
        from arcflow.system.packages import about

        check_drawing(steps=self.steps, batch=self.batch)
        adapter, guidance = adapter_of(self.model, self.adapter), self.guidance
        if adapter and guidance is None:
            from arcflow.student.adapter import read_info

            guidance = read_info(adapter).guidance
        height, width = size_of(self.model, self.height, self.width)
        run = plan(self, share_of_work(), adapter, height=height, width=width, guidance=guidance, version=__version__)
        run.draw(
            lambda: (
                open_student(self.model, adapter, self.device, self.dtype)
                if adapter
                else open_pipe(self.model, self.device, self.dtype)
            )
        )
        run.score()
        results = run.results(about(command=f"arcflow {' '.join(sys.argv[1:])}"))
        if results is None:
            print(f"process {run.share[0]} of {run.share[1]} is done; the last one writes {self.out / 'results.json'}")
            return
        for name, metric in results["metrics"].items():
            print(f"{name:<28}{told(metric)}")
        print(f"evaluation took {results['seconds']['share']:.1%} of the time of the generation")
        print(f"numbers: {self.out / 'results.json'}")


def told(metric: dict[str, Any]) -> str:
    """One line about a metric."""
    if metric["value"] is None:
        return f"none: {metric['why']}"
    low = metric.get("low")
    return f"{metric['value']:.4f}" + (f" [{low:.4f}, {metric['high']:.4f}]" if low is not None else "")
