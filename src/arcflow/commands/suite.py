"""What `arcflow evaluate --suite NAME` does: draw a benchmark's images, score them, write results.json; resumable."""

import sys
from typing import TYPE_CHECKING

from arcflow import __version__
from arcflow.evaluation.request import Request
from arcflow.evaluation.suites import SUITES
from arcflow.evaluation.suites.suite import read_items
from arcflow.sampling.options import Drawing, Machine, Subject, part_of

if TYPE_CHECKING:
    from arcflow.sampling.open import Setup


def run_suite(request: Request) -> None:
    """Draw and score what is missing, and tell the numbers when nothing is."""
    from arcflow.evaluation.images import alone
    from arcflow.sampling.folder import share_of_work
    from arcflow.sampling.open import settle

    assert request.suite
    read_items(SUITES[request.suite], request.prompts, count=request.count, complete=request.complete)  # or say so now
    setup = settle(part_of(Subject, request), part_of(Drawing, request), part_of(Machine, request))
    share = share_of_work()
    with alone(request.folder, share):
        _run(request, setup, share)


def _run(request: Request, setup: "Setup", share: tuple[int, int]) -> None:
    from arcflow.evaluation.results import told
    from arcflow.evaluation.suite_run import plan
    from arcflow.system.packages import About, about

    settled = setup.recorded
    run = plan(
        request,
        share,
        setup.adapter,
        height=setup.height,
        width=setup.width,
        guidance=settled.pop("guidance"),
        version=__version__,
        fused=setup.fused,
        told=settled,
    )
    run.draw(setup.open)
    run.score()
    results = run.results(About(**about(command=f"arcflow {' '.join(sys.argv[1:])}")))
    if results is None:
        if share[1] == 1:
            raise ValueError(
                f"{request.folder}: images or numbers are missing although all was done, so something took them "
                f"away: expected this command alone in the folder; run it again, it makes what is missing"
            )
        print(
            f"process {share[0]} of {share[1]} is done; the last one writes {request.folder / 'results.json'}. If none "
            f"is at work any more and it is not there, run the same command again"
        )
        return
    for name, metric in results.metrics.items():
        print(f"{name:<28}{told(metric)}")
    print(f"evaluation took {results.seconds.share:.1%} of the time of the generation")
    print(f"numbers: {request.folder / 'results.json'}")
