"""`arcflow compare`: few-step methods on one bench and one budget."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from arcflow.comparison.config import Plan


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train few-step methods on one budget and say which are better, and by more than noise. Resumable, run by run."""

    quick: bool = False
    """A taste of it in a few minutes: 2 calls, two trainings, a small budget, few prompts, in out/compare_quick. What
    is given beside it is taken as it is."""
    json: bool = False
    """Print the results as JSON."""
    plan: Annotated[Plan, OmitArgPrefixes] = field(default_factory=Plan)

    def run(self) -> None:
        from arcflow.comparison.runs import compare
        from arcflow.reports.comparison import ranking_table, write_ranking
        from arcflow.system.devices import keep_buffers
        from arcflow.system.owner import owned

        keep_buffers()
        plan = self.plan
        out = Path(self.plan.out)
        with owned(out, "compares"):
            results = compare(plan)
            write_ranking(out / f"{plan.study}.html", results, out)
        if self.json:
            print((out / f"{plan.study}.json").read_text("utf-8"), end="")
            return
        print(ranking_table(results).text())
        print(f"report: {out / plan.study}.html\nnumbers: {out / plan.study}.json")
