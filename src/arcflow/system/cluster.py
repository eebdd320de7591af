"""Ray, joined for a while: a cluster that is there, or one of this machine alone that ends with us.

A Ray of our own listens on the loopback address only, for whoever reaches its ports runs code. Nothing is reported to
anyone about its use, unless the user's own settings say so.
"""

# pyright: reportMissingImports=false
# Ray is an extra that few have.

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from arcflow.system.packages import need

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # else the node takes the address of the network
"""Set unless the user has set them, before Ray is imported."""


def need_ray(part: str, address: str | None) -> None:
    """Import Ray, and a part of it.

    Raises:
        ValueError: it is not installed.
    """
    for name, value in (QUIET if address else QUIET | ALONE).items():
        os.environ.setdefault(name, value)
    need("ray", asked="--ray", install="arcflow[ray]")
    need(f"ray.{part}", asked="--ray", install="arcflow[ray]")


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray, connected while the block runs; `need_ray` has imported it.

    Args:
        address: of a running cluster, HOST:PORT, ray://HOST:PORT or "auto"; None starts one here.

    Raises:
        ValueError: no cluster is at this address.
    """
    import ray

    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except Exception as error:  # Ray's own are of no common kind
        line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no Ray cluster at {address or 'this machine'} ({line}): start one, or correct --address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def gpus_of_a_worker(asked: float | None) -> float:
    """GPUs that each worker takes: what was asked for, else one where the cluster has any."""
    import ray

    return asked if asked is not None else float(ray.cluster_resources().get("GPU", 0) > 0)


def workers_that_fit(asked: int | None, cpus: float, gpus: float) -> int:
    """How many workers there are to be: what was asked for, else as many as the cluster has room for.

    Raises:
        ValueError: it has room for none.
    """
    import ray

    there = ray.cluster_resources()
    room = min(there.get(kind, 0) // each for kind, each in (("CPU", cpus), ("GPU", gpus)) if each)
    if room < 1:
        raise ValueError(
            f"the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, and a worker takes "
            f"{cpus:g} and {gpus:g}: expected room for one; give --cpus or --gpus"
        )
    return asked or int(room)
