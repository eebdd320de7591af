"""What `arcflow evaluate --suite NAME` does: draw a benchmark's images, score them, write results.json; resumable."""

import sys
from typing import TYPE_CHECKING

from arcflow import __version__
from arcflow.evaluation.request import Request
from arcflow.evaluation.suites import SUITES
from arcflow.evaluation.suites.suite import read_items

if TYPE_CHECKING:
    from arcflow.sampling.open import Setup


def run_suite(request: Request) -> None:
    """Draw and score what is missing, and tell the numbers when nothing is."""
    from arcflow.sampling.folder import share_of_work

    assert request.suite
    read_items(SUITES[request.suite], request.prompts, count=request.count, complete=request.complete)  # or say so now
    fleet = request.fleet
    fleet.check()
    if fleet.ray:
        from arcflow.system.cluster import need_ray

        need_ray("data", fleet.address)
        from arcflow.evaluation.on_ray import on_ray

        print("\n".join(on_ray(run_share, request, fleet, f"arcflow {' '.join(sys.argv[1:])}")))
        return
    share = share_of_work()
    print("\n".join(run_share(request, share, f"arcflow {' '.join(sys.argv[1:])}")))


def run_share(request: Request, share: tuple[int, int], command: str) -> list[str]:
    """Draw and score what is missing of one process's share; what to tell."""
    from arcflow.evaluation.images import alone
    from arcflow.sampling.open import settle

    setup = settle(request.subject, request.drawing, request.machine)
    with alone(request.folder, share):
        return _run(request, setup, share, command)


def _run(request: Request, setup: "Setup", share: tuple[int, int], command: str) -> list[str]:
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
    results = run.results(About(**about(command=command)))
    if results is None:
        if share[1] == 1:
            raise ValueError(
                f"{request.folder}: images or numbers are missing although all was done, so something took them "
                f"away: expected this command alone in the folder; run it again, it makes what is missing"
            )
        return [
            f"process {share[0]} of {share[1]} is done; the last one writes {request.folder / 'results.json'}. If none "
            f"is at work any more and it is not there, run the same command again"
        ]
    return [
        *(f"{name:<28}{told(metric)}" for name, metric in results.metrics.items()),
        f"evaluation took {results.seconds.share:.1%} of the time of the generation",
        f"numbers: {request.folder / 'results.json'}",
    ]
