"""What `arcflow evaluate --suite NAME` does: draw a benchmark's pictures, score them, write results.json; resumable."""

import sys

from arcflow import __version__
from arcflow.evaluation.request import Request


def run_suite(request: Request) -> None:
    """Draw and score what is missing, and tell the numbers when nothing is."""
    from arcflow.evaluation.pictures import alone
    from arcflow.sampling.folder import share_of_work
    from arcflow.sampling.open import adapter_of, check_drawing, size_of
    from arcflow.student.adapter import read_info

    check_drawing(steps=request.steps, batch=request.batch)
    adapter, guidance = adapter_of(request.model, request.adapter), request.guidance
    if adapter and guidance is None:
        guidance = read_info(adapter).guidance
    height, width = size_of(request.model, request.height, request.width)
    share = share_of_work()
    with alone(request.folder, share):
        _run(request, adapter, height, width, guidance, share)


def _run(
    request: Request, adapter: str, height: int, width: int, guidance: float | None, share: tuple[int, int]
) -> None:
    from arcflow.evaluation.results import told
    from arcflow.evaluation.suite_run import plan
    from arcflow.sampling.open import open_pipe, open_student
    from arcflow.system.packages import About, about

    run = plan(request, share, adapter, height=height, width=width, guidance=guidance, version=__version__)
    run.draw(
        lambda: (
            open_student(request.model, adapter, request.device, request.dtype)
            if adapter
            else open_pipe(request.model, request.device, request.dtype)
        )
    )
    run.score()
    results = run.results(About(**about(command=f"arcflow {' '.join(sys.argv[1:])}")))
    if results is None:
        print(f"process {share[0]} of {share[1]} is done; the last one writes {request.folder / 'results.json'}")
        return
    for name, metric in results.metrics.items():
        print(f"{name:<28}{told(metric)}")
    print(f"evaluation took {results.seconds.share:.1%} of the time of the generation")
    print(f"numbers: {request.folder / 'results.json'}")
