"""`arcflow evaluate`: teacher, plain Euler and student on held-out prompts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from arcflow.commands.suite import run_suite
from arcflow.evaluation.request import Request
from arcflow.sampling.open import SHIPPED, open_pipe, settle
from arcflow.sampling.options import Drawing, Machine, Subject, part_of
from arcflow.world.scene import FIRST_SEED, HELD_OUT, held_out


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Teacher at 50 steps, plain Euler at 2, 4, 8 and the student at 1, 2, 4, on held-out prompts of the world; with
    --suite NAME the images of a benchmark, scored, by any model."""

    request: Annotated[Request, OmitArgPrefixes] = field(default_factory=Request)

    def run(self) -> None:
        self.request.check()
        if self.request.suite:
            run_suite(self.request)
            return
        from arcflow.system.owner import owned

        with owned(self.request.folder, "evaluates"):
            _side_by_side(self.request)


def _side_by_side(request: Request) -> None:
    from arcflow.evaluation import side_by_side
    from arcflow.evaluation.results import Evaluation, Made
    from arcflow.reports.side_by_side import short_table, write_report
    from arcflow.system import files, records
    from arcflow.system.packages import about
    from arcflow.world.check import accuracy, is_right
    from arcflow.world.scene import SIZE

    subject = part_of(Subject, request)
    setup = settle(subject, Drawing(), Machine(device=request.device, fuse=request.fuse, no_fuse=request.no_fuse))
    if not setup.adapter:
        raise ValueError("--adapter none has no student to compare: expected an adapter, or --suite world with it")
    adapter, out, seeds = Path(setup.adapter), request.folder, request.images or 1
    first = FIRST_SEED if request.seed is None else request.seed
    prompts = held_out(HELD_OUT if request.count is None else request.count)
    pipe = open_pipe(SHIPPED, request.device, "float32", setup.lora)
    size = {"height": SIZE, "width": SIZE}
    results, samples = side_by_side.compare(
        pipe,
        adapter,
        prompts,
        accuracy=accuracy,
        seeds=seeds,
        first_seed=first,
        fuse=setup.fused,
        progress=True,
        **size,
    )
    made = Made(**about(command=f"arcflow {' '.join(sys.argv[1:])}", adapter=request.adapter))
    evaluation = Evaluation(**results, about=made)
    records.write(out / "results.json", evaluation)
    ways = [side_by_side.tracks(pipe, adapter, text, first + i * seeds, **size) for i, text in three(prompts)]
    words = [text for text in prompts for _ in range(seeds)]
    curves = files.read_lines(adapter.parent / "log.jsonl")
    write_report(out / "report.html", evaluation, samples, words, ways, curves, is_right=is_right)
    print(short_table(evaluation).text())
    print(f"report: {out / 'report.html'}\nnumbers: {out / 'results.json'}")


def three(prompts: Sequence[str]) -> list[tuple[int, str]]:
    """The images whose paths the report draws: of the first six, one for each skill, every other one."""
    return list(enumerate(prompts))[:6][::2]
