"""A suite on Ray: the shares of its work, as `torchrun` deals them out, by workers that Ray starts and starts again.

A share is images, their numbers, and what scorers say about them, each scorer a command in an environment of its own;
so there are as many of each scorer at work as workers. The folder is what they have in common, hence all must see it. A
worker that dies is replaced, and the new one goes on from what is in the folder; when all shares are done one more sums
up.
"""

# pyright: reportMissingImports=false
# Ray is an extra that few have.

import os
from collections.abc import Callable

import ray
from ray.exceptions import RayTaskError

from arcflow.evaluation.request import Request
from arcflow.sampling.options import Fleet
from arcflow.system.cluster import connected, gpus_of_a_worker, workers_that_fit

Share = Callable[[Request, tuple[int, int], str], list[str]]
"""Does one share of the work, (its number, of how many), for this command line; what to tell the user."""


def on_ray(share: Share, request: Request, fleet: Fleet, command: str) -> list[str]:
    """What the last share tells, when all others are done.

    Raises:
        ValueError: what a worker refuses, in its words.
    """
    folder = os.getcwd()
    with connected(fleet.address):
        gpus = gpus_of_a_worker(fleet.gpus)
        workers = workers_that_fit(fleet.workers, fleet.cpus, gpus)
        work = ray.remote(_share).options(num_cpus=fleet.cpus, num_gpus=gpus, max_retries=-1)
        try:
            ray.get([work.remote(share, request, (rank, workers), command, folder) for rank in range(workers)])
            return ray.get(work.remote(share, request, (0, 1), command, folder))
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, ValueError) else None
            raise cause or ValueError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from error


def _share(share: Share, request: Request, which: tuple[int, int], command: str, folder: str) -> list[str]:
    if os.path.isdir(folder):
        os.chdir(folder)  # where the command's paths begin
    return share(request, which, command)
