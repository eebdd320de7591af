"""One process that serves an application until it is told to stop.

uvicorn runs in a thread of its own, so that the signals are ours: the first SIGTERM or SIGINT lets the batch that is
being drawn end, refuses what waits (503 with Retry-After) and closes the doors; the process then ends with 0. A second
one a few seconds later ends it at once.
"""

import logging
import threading
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from arcflow.serving.engine import Engine
from arcflow.system.signals import stop_signals

GRACE = 30
"""Seconds that answers may take to be sent after the last image."""


class Server:
    """An application on a port, in a thread."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
        )
        self.server = uvicorn.Server(config)
        self.host = host
        self.thread = threading.Thread(target=self.server.run, name="arcflow-http", daemon=True)

    def __enter__(self) -> "Server":
        """Begin to listen.

        Raises:
            ValueError: the port is taken, or not ours.
        """
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)
        if not self.server.started:
            raise ValueError(f"cannot listen on {self.host}:{self.server.config.port}; take another --port")
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    @property
    def port(self) -> int:
        """The port, also when 0 was asked for: any that is free."""
        return self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}"


def serve(app: FastAPI, engine: Engine, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve until a signal comes.

    Raises:
        ValueError: the port is taken, or the model cannot be loaded.
        Exception: whatever ended the engine.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with stop_signals() as caught, Server(app, host, port) as server:
        say(f"listening on {server.address}, loading")
        while not caught and engine.state == "loading":
            time.sleep(0.05)
        if engine.error is not None:
            raise engine.error
        if engine.state == "ready":
            say(f"ready: open {server.address} (OpenAI base_url: {server.address}/v1; {server.address}/docs)")
        while not caught and server.thread.is_alive() and engine.thread.is_alive():
            time.sleep(0.1)
        say("finishing what is being drawn")
        engine.close()
    if engine.error is not None:
        raise engine.error
    say("stopped")
