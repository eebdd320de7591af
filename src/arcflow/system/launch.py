"""A training by several processes of one machine, without `torchrun`.

On CPU cores a process for each, with a copy of the network, trains faster than one process with a thread for each: the
networks are small, and threads wait for each other in every layer. The processes are plain `arcflow train` commands
that find each other by a file that this user alone can read, and talk over the loopback interface. They stop together,
whichever of them is told to, and none outlives the one that started them.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from arcflow.system.devices import cores
from arcflow.system.processes import STORE
from arcflow.system.signals import LAUNCHED, WISHES, stop_signals

STOPPED = tuple(128 + number for number in WISHES)
"""Exit codes of a training that was told to stop and has saved."""

GRACE = 10.0
"""Seconds that the others are left when one has failed."""


def run_together(words: Sequence[str], count: int) -> int:
    """Exit code of `arcflow` with these words in `count` new processes that find each other as those of `torchrun` do.

    Progress and errors are those of the first process, the code is that of the first which fails.
    """
    meeting = tempfile.mkdtemp(prefix="arcflow-")
    shared = {
        **os.environ,
        "WORLD_SIZE": str(count),
        STORE: os.path.join(meeting, "store"),
        LAUNCHED: meeting,
        "OMP_NUM_THREADS": str(max(1, cores() // count)),
    }
    if loopback := {"linux": "lo", "darwin": "lo0"}.get(sys.platform):
        shared["GLOO_SOCKET_IFNAME"] = loopback
    with stop_signals() as caught, tempfile.TemporaryFile() as said:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "arcflow.cli", *words],
                env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)},
                stdin=subprocess.PIPE,  # which closes when this process ends, however it does
                stdout=None if i == 0 else subprocess.DEVNULL,
                stderr=None if i == 0 else said,
            )
            for i in range(count)
        ]
        try:
            code = _wait(processes, caught)
            if code and processes[0].returncode in (0, -signal.SIGKILL):
                _tell(said)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
            shutil.rmtree(meeting, ignore_errors=True)
    return code


def _wait(processes: Sequence[subprocess.Popen], caught: Sequence[int]) -> int:
    """Until all have ended: the first code that is not 0. Signals are handed on; if one fails, the others end too."""
    told = 0
    failed = 0
    until = float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        codes = [process.returncode for process in processes]
        for number in caught[told:]:
            told += 1
            for process in processes:
                process.send_signal(number)
        wrong = [code for code in codes if code and code not in STOPPED]
        if wrong and not failed:
            failed = wrong[0]
            until = time.monotonic() + GRACE
        if time.monotonic() > until:
            for process in processes:
                process.kill()
    return failed or next((process.returncode for process in processes if process.returncode), 0)


def _tell(said: IO[bytes]) -> None:
    """What the other processes had to say."""
    said.seek(0)
    sys.stderr.write(said.read().decode(errors="replace"))
