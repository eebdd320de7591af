"""`arcflow evaluate`: teacher, plain Euler and student on held-out prompts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arcflow import config
from arcflow.sampling.open import SHIPPED, adapter_of, open_pipe
from arcflow.world.scene import FIRST_SEED, held_out


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Teacher at 50 steps, plain Euler at 2, 4, 8 and the student at 1, 2, 4, on held-out prompts of the world; with
    --suite NAME a benchmark: `arcflow evaluate --suite world --help`."""

    adapter: str = SHIPPED
    """Adapter of the small teacher: "world" for the shipped one, or a folder."""
    count: int = 384
    """Held-out prompts."""
    seeds: int = 1
    """Pictures of each prompt."""
    out: Path = Path("out/evaluate")
    """Folder for results.json, report.html and path.png."""
    device: config.Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""

    def run(self) -> None:
        from arcflow.evaluation import side_by_side
        from arcflow.evaluation.results import Evaluation, Made
        from arcflow.reports.side_by_side import write_report
        from arcflow.student.adapter import read_info
        from arcflow.system import files, records
        from arcflow.system.packages import about
        from arcflow.world.check import accuracy
        from arcflow.world.scene import SIZE

        adapter = Path(adapter_of(SHIPPED, self.adapter))
        prompts = held_out(self.count)
        pipe = open_pipe(SHIPPED, self.device, "float32", read_info(adapter).teacher_lora)
        size = {"height": SIZE, "width": SIZE}
        results, samples = side_by_side.compare(
            pipe, adapter, prompts, judge=accuracy, seeds=self.seeds, first_seed=FIRST_SEED, progress=True, **size
        )
        made = Made(**about(command=f"arcflow {' '.join(sys.argv[1:])}", adapter=self.adapter))
        evaluation = Evaluation(**results, about=made)
        records.write(self.out / "results.json", evaluation)
        ways = [
            side_by_side.tracks(pipe, adapter, text, FIRST_SEED + i * self.seeds, **size) for i, text in three(prompts)
        ]
        log = adapter.parent / "log.jsonl"
        words = [text for text in prompts for _ in range(self.seeds)]
        curves = files.read_lines(log)
        write_report(self.out / "report.html", evaluation, samples, words, ways, curves)
        for row, result in results.items():
            print(
                f"{row:<12}{result.nfe:>3} calls   distance {result.mse_to_teacher:.4f}   accuracy {result.right:.1%}"
            )
        print(f"report: {self.out / 'report.html'}\nnumbers: {self.out / 'results.json'}")


def three(prompts: Sequence[str]) -> list[tuple[int, str]]:
    """The images whose paths the report draws: of the first six, one for each skill, every other one."""
    return list(enumerate(prompts))[:6][::2]
