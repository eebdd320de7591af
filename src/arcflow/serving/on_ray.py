"""The same application on many machines: replicas of Ray Serve, each with an engine and a pipeline of its own.

A replica is `create_app` over an `Engine`, as on one machine; Ray routes requests to the replica with the fewest,
starts more as more come in, and starts another where one has died. The engine batches inside the replica, for it alone
knows what may be drawn together. When a replica's queue is full it answers 429 itself; what Ray holds back before that
is a 429 with Retry-After too. A replica that is taken away gets nothing new and draws what it has taken.

`application` is what a Serve config file names (docs/serving.md):

    applications:
      - import_path: arcflow.serving.on_ray:application
        args: {model: black-forest-labs/FLUX.1-dev, adapters: {two-steps: "ymyy307/ArcFlow:arcflow-flux-2steps"}}
"""

# pyright: reportMissingImports=false
# Ray is an extra that few have.

import logging
import os
import socket
import time
from collections.abc import Callable

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions

from arcflow.config import Device, Dtype, Fit
from arcflow.sampling.open import SHIPPED
from arcflow.serving.app import Limits, create_app
from arcflow.serving.engine import Engine
from arcflow.serving.offer import StudioSetup
from arcflow.serving.studio import Studio
from arcflow.system.cluster import connected, gpus_of_a_worker
from arcflow.system.signals import stop_signals

NAME = "arcflow"
"""Name of the application, and of its deployment."""

PATIENCE = 60.0
"""Seconds in which a replica that is taken away may draw what it has taken."""

RETRY = 2.0
"""Seconds after which a request that Ray has held back may come again."""


class Hosting(BaseModel):
    """What a replica serves, and how many there are; the arguments of a Serve config file."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = SHIPPED
    adapters: dict[str, str] = Field(default_factory=lambda: {SHIPPED: SHIPPED}, min_length=1)
    styles: dict[str, str] = {}
    teacher_lora: str | None = None
    device: Device = "auto"
    dtype: Dtype | str = "auto"
    fit: Fit = "auto"
    max_batch: int = Field(8, ge=1)
    max_waiting: int = Field(64, ge=1)
    max_side: int = Field(2048, ge=1)
    api_key: str | None = None
    """By default what stands in ARCFLOW_API_KEY where the replica runs."""
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    """With it replicas come and go between these numbers, by how many requests are on their way."""
    cpus: float = Field(1.0, ge=0)
    gpus: float | None = Field(None, ge=0)
    """GPUs of each replica; by default one where the cluster has any."""


class Replica:
    """What Ray asks of a replica beside the application."""

    app: FastAPI

    def check_health(self) -> None:
        """Raise if the engine has died: Ray then starts another replica."""
        engine: Engine = self.app.state.engine
        if engine.error is not None:
            raise RuntimeError(f"the engine has failed: {engine.error}")


def application(hosting: Hosting) -> Application:
    """The application, for `serve.run` or a Serve config file."""
    if hosting.max_replicas is not None and hosting.max_replicas < hosting.replicas:
        raise ValueError(
            f"max_replicas is {hosting.max_replicas}: expected at least {hosting.replicas}, the number of replicas"
        )
    scale = None
    if hosting.max_replicas is not None:
        scale = AutoscalingConfig(
            min_replicas=hosting.replicas,
            max_replicas=hosting.max_replicas,
            target_ongoing_requests=hosting.max_batch,
        )
    deployment = serve.deployment(
        serve.ingress(_builder(hosting))(Replica),
        name=NAME,
        num_replicas=None if scale else hosting.replicas,
        autoscaling_config=scale,
        max_ongoing_requests=hosting.max_waiting + hosting.max_batch,  # the engine's own queue is full first
        max_queued_requests=hosting.max_waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY),
        graceful_shutdown_timeout_s=PATIENCE,
        max_constructor_retry_count=3,
        ray_actor_options={"num_cpus": hosting.cpus, "num_gpus": gpus_of_a_worker(hosting.gpus)},
    )
    return deployment.bind()


def _builder(hosting: Hosting) -> Callable[[], FastAPI]:
    """What makes the application in a replica; it is sent there, with what it knows."""

    def build() -> FastAPI:
        setup = StudioSetup(
            model=hosting.model,
            adapters=hosting.adapters,
            styles=hosting.styles,
            teacher_lora=hosting.teacher_lora,
            device=hosting.device,
            dtype=hosting.dtype,  # type: ignore[arg-type]
            fit=hosting.fit,
            max_batch=hosting.max_batch,
        )
        engine = Engine(lambda: Studio(setup), max_waiting=hosting.max_waiting)
        engine.start()
        engine.ready()  # a replica counts as one when it can draw
        key = hosting.api_key or os.environ.get("ARCFLOW_API_KEY") or None
        limits = Limits(side=hosting.max_side, pixels=hosting.max_side**2)
        return create_app(engine, api_key=key, limits=limits)

    return build


def serve_on_ray(hosting: Hosting, host: str, port: int, address: str | None, say: Callable[[str], object]) -> None:
    """Serve until a signal comes; then what is being drawn is finished, and the application is taken away.

    Raises:
        ValueError: no cluster, or no replica could be started there.
    """
    port = port or _free(host)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with connected(address), stop_signals() as caught:  # Ray has a handler of its own, which is replaced
        serve.start(http_options=HTTPOptions(host=host, port=port))
        say(f"starting {hosting.replicas} replicas")
        try:
            serve.run(application(hosting), name=NAME, route_prefix="/")
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            say(f"ready: open {where} (OpenAI base_url: {where}/v1; {where}/docs)")
            while not caught:
                time.sleep(0.1)
            say("finishing what is being drawn")
        except RuntimeError as error:
            line = next((line for line in str(error).splitlines()[::-1] if line.strip()), "no reason given")
            raise ValueError(f"no replica could be started ({line.strip()}); its log says more") from error
        finally:
            serve.delete(NAME)
            if address is None:
                serve.shutdown()
    say("stopped")


def _free(host: str) -> int:
    """A port that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
