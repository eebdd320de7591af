"""`python -m benchmarks.digits`."""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.conf import OmitArgPrefixes

import benchmarks.digits as digits
from arcflow.comparison.bench import Bench
from arcflow.comparison.config import Plan
from arcflow.comparison.results import Comparison, counts
from arcflow.comparison.runs import bench_reference, compare
from arcflow.reports.comparison import ranking_table, write_ranking
from arcflow.system import files, records
from arcflow.system.owner import owned
from benchmarks.digits import order
from benchmarks.digits.bench import DIGITS, USUAL
from benchmarks.digits.pictures import checker_error, distance_to_real, pictures
from benchmarks.digits.teacher import Lengths, train

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Train the teacher; goes on where it stopped."""

    out: Path = Path("out/digits")
    """Folder for the stages; the pipeline ends up in its `teacher`."""
    lengths: Annotated[Lengths, OmitArgPrefixes] = field(default_factory=Lengths)

    def run(self) -> None:
        with owned(self.out, "trains"):
            print(f"teacher: {train(self.out, self.lengths)}")


def compared(plan: Plan) -> None:
    """Do the runs that are missing, then write report and results."""
    out = Path(plan.out)
    with owned(out, "compares"):
        results = compare(plan, subject=DIGITS)
        report = write_ranking(out / "digits.html", results, out, DIGITS)
        first = records.read(Comparison, RESULTS / "methods.json")
        beside = [ground(plan), "The order of the methods against that of the first bench (`methods.json`):"]
        text = report.with_suffix(".md").read_text("utf-8")
        text += "\n" + "\n\n".join([*beside, order.table(first, results, counts(results.rows)).markdown()]) + "\n"
        files.write_text(RESULTS / "digits.md", text)
        records.write(RESULTS / "digits.json", results)
        shutil.copyfile(report.with_suffix(".png"), RESULTS / "digits.png")
    print(ranking_table(results).text())


def ground(plan: Plan) -> str:
    """What the numbers stand on: the checker's own error, and the teacher's own images."""
    bench = Bench(plan, DIGITS)
    images = bench.images(bench_reference(plan, bench).latents)
    right, apart = np.mean(bench.right(images)), distance_to_real(images)
    real = distance_to_real(pictures("teacher").images)
    return (
        f"The checker reads {checker_error():.1%} of the real pictures that it has not seen wrongly. The teacher's own "
        f"images in 50 calls: accuracy {right:.1%}, {apart:.1f} to real pictures; the pictures it was trained on, "
        f"{real:.1f}."
    )


def main() -> None:
    action, *rest = sys.argv[1:] or [""]
    if action == "teacher":
        tyro.cli(Teacher, args=rest).run()
    elif action == "compare":
        compared(tyro.cli(Plan, args=rest, default=USUAL))
    else:
        sys.exit(f"{digits.__doc__}\nexpected teacher or compare, got {action!r}")


if __name__ == "__main__":
    main()
