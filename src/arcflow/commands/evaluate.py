"""`arcflow evaluate`: teacher, plain Euler and student side by side, of the small world or of any model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from arcflow.commands.suite import run_suite
from arcflow.config import check
from arcflow.evaluation.request import Request
from arcflow.sampling.open import SHIPPED, open_pipe, settle
from arcflow.world.scene import FIRST_SEED, HELD_OUT, held_out


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Show a student beside its teacher and plain Euler, from the same noise, on one page. Of the small world the
    checker counts what is right, in 1 to 8 steps; any other --model draws a handful of prompts; with --suite NAME the
    images of a benchmark are drawn and scored."""

    request: Annotated[Request, OmitArgPrefixes, tyro.conf.arg(name="")] = field(default_factory=Request)

    def run(self) -> None:
        self.request.check()
        if self.request.suite:
            run_suite(self.request)
            return
        from arcflow.system.owner import owned

        with owned(self.request.folder, "evaluates"):
            _handful(self.request) if self.request.handful else _side_by_side(self.request)


def _side_by_side(request: Request) -> None:
    from arcflow.evaluation import side_by_side
    from arcflow.evaluation.results import Evaluation, EvaluationAbout
    from arcflow.reports.side_by_side import evaluation_table, write_report
    from arcflow.system import files, records
    from arcflow.system.packages import about
    from arcflow.world.check import accuracy, is_right
    from arcflow.world.scene import SIZE

    setup = settle(request.subject, request.drawing, request.machine)
    if setup.info is None:
        raise ValueError("--adapter none has no student to compare: expected an adapter, or --suite world with it")
    adapter = Path(setup.adapter)
    out = request.folder
    seeds = request.images or 1
    first = FIRST_SEED if request.seed is None else request.seed
    prompts = held_out(HELD_OUT if request.count is None else request.count)
    pipe = open_pipe(SHIPPED, request.machine.device, "float32", setup.lora)
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
    command = f"arcflow {' '.join(sys.argv[1:])}"
    made = EvaluationAbout(**about(command=command, adapter=request.subject.adapter), steps=setup.info.steps)
    evaluation = Evaluation(**results, about=made)
    records.write(out / "results.json", evaluation)
    ways = [side_by_side.tracks(pipe, adapter, text, first + i * seeds, **size) for i, text in three(prompts)]
    words = [text for text in prompts for _ in range(seeds)]
    curves = files.read_lines(adapter.parent / "log.jsonl")
    write_report(out / "report.html", evaluation, samples, words, ways, curves, is_right=is_right)
    print(evaluation_table(evaluation).text())
    print(f"report: {out / 'report.html'}\nnumbers: {out / 'results.json'}")


HANDFUL = 8
"""Prompts of the page of any model, where nobody says how many."""


def _handful(request: Request) -> None:
    """The page of any model: teacher, plain Euler at the student's steps, student."""
    from arcflow.evaluation import handful
    from arcflow.evaluation.results import EvaluationAbout
    from arcflow.reports.handful import handful_table, write_handful
    from arcflow.system import records
    from arcflow.system.packages import about

    texts = _few(request)
    setup = settle(request.subject, request.drawing, request.machine)
    if not setup.adapter:
        raise ValueError("--adapter none has no student to compare: expected an adapter, or `arcflow sample` with it")
    out = request.folder
    each = request.images or 1
    first = request.seed or 0
    prompts = [text for text in texts for _ in range(each)]
    seeds = list(range(first, first + len(prompts)))
    samples = handful.draw_ways(setup, prompts, seeds, request.machine.batch)
    made = EvaluationAbout(**about(command=f"arcflow {' '.join(sys.argv[1:])}", adapter=request.subject.adapter))
    results = handful.measured(setup, samples, prompts, seeds, each, made)
    handful.keep(samples, out / "images")
    records.write(out / "results.json", results)
    write_handful(out / "report.html", results, samples, prompts)
    print(handful_table(results).text())
    print(f"report: {out / 'report.html'}\nimages: {out / 'images'}\nnumbers: {out / 'results.json'}")


def _few(request: Request) -> list[str]:
    """The prompts of that page, evenly spread over what is given."""
    from arcflow.data.grammar import MOST, prompts
    from arcflow.data.prompts import read_prompts
    from arcflow.evaluation.suites.suite import spread

    count = HANDFUL if request.count is None else request.count
    if request.prompts is None:
        check(count <= MOST, "--count", count, f"at most {MOST}", "leave it out")
        return list(prompts(count))
    rows, message = read_prompts(request.prompts)
    sized = sum(row.size is not None for row in rows)
    ignored = f"{sized} of {len(rows)} rows have a size; all are drawn in one, that of --height and --width"
    for told in (message, ignored if sized else None):
        if told:
            print(told, file=sys.stderr)
    taken = spread(rows, count)
    if len(taken) < len(rows) and request.count is None:
        print(f"{len(taken)} of {len(rows)} prompts; --count takes more", file=sys.stderr)
    return [row.text for row in taken]


def three(prompts: Sequence[str]) -> list[tuple[int, str]]:
    """The images whose paths the report draws: of the first six, one for each skill, every other one."""
    return list(enumerate(prompts))[:6][::2]
