"""`arcflow compare`: few-step methods on one bench and one budget."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from arcflow.comparison.config import Plan


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train few-step methods on one budget and say which are better, and by more than noise. Resumable, run by run."""

    quick: bool = False
    """A taste of it in a few minutes: 2 calls, two trainings, a small budget, few prompts."""
    plan: Annotated[Plan, OmitArgPrefixes] = field(default_factory=Plan)

    def run(self) -> None:
        from arcflow.comparison.runs import compare
        from arcflow.reports.comparison import short_table, write_ranking
        from arcflow.system.devices import keep_buffers
        from arcflow.system.owner import owned

        keep_buffers()
        plan = shorten(self.plan) if self.quick else self.plan
        out = Path(plan.out)
        with owned(out, "compares"):
            results = compare(plan)
            write_ranking(out / f"{plan.study}.html", results, out)
        print(short_table(results).text())
        print(f"report: {out / plan.study}.html\nnumbers: {out / plan.study}.json")


def shorten(plan: Plan) -> Plan:
    """The same plan, just long enough to see that every method trains and samples."""
    return replace(
        plan,
        out=f"{plan.out}_quick",
        calls=(2,),
        seeds=2,
        budget=12_000,
        prompts=1024,
        count=96,
        alike=8,
    )
