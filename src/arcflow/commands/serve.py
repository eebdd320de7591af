"""`arcflow serve`: an images server with a page."""

import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction

from arcflow import config
from arcflow.sampling.open import SHIPPED
from arcflow.sampling.options import Fleet, unset


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve images in OpenAI's protocol, with a page to look at (http://127.0.0.1:8000)."""

    model: str = SHIPPED
    """Teacher: "world" for the shipped small one, a diffusers pipeline folder, or a Hub id."""
    adapter: UseAppendAction[tuple[str, ...]] = ()
    """Adapter folder, file or Hub id, also as NAME=PATH; several times for several, the first one is the default."""
    lora: UseAppendAction[tuple[str, ...]] = ()
    """A style as NAME=PATH (file, folder or Hub id), for requests to name; may be given several times."""
    teacher_lora: Annotated[str | None, unset("STR")] = None
    """A LoRA on the teacher: file, folder or Hub id. An adapter that was distilled with one asks for it; "none" draws
    without."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others in, then give --api-key."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    api_key: str | None = None
    """Key that clients must send; by default what stands in ARCFLOW_API_KEY."""
    max_batch: int = 8
    """Images drawn together at most."""
    max_waiting: int = 64
    """Images in the queue at most; more are answered 429."""
    max_side: int | None = None
    """Largest height or width; by default four times the model's own, at most 2048."""
    device: config.Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: config.Dtype | Literal["auto"] = "auto"
    """Precision of the weights; auto takes bfloat16 on cuda, else float32."""
    fit: config.Fit = "auto"
    """How the model is fitted to the card: whole, one part at a time, in 8 or 4 bits, or layer by layer; auto does what
    `arcflow doctor` advises."""

    fleet: Annotated[Fleet, OmitArgPrefixes] = Fleet()
    max_workers: Annotated[int | None, unset("INT")] = None
    """With --ray: processes at most; their number then follows the requests, from --workers (or one) on."""

    def run(self) -> None:
        self.fleet.check()
        if self.max_workers is not None and not self.fleet.ray:
            raise ValueError("--max-workers says how to work on Ray: expected --ray with it, or leave it out")
        for name, value in (("max_batch", self.max_batch), ("max_waiting", self.max_waiting)):
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: expected at least 1")
        try:
            import fastapi  # noqa: F401
            import multipart  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is missing: pip install 'arcflow[serve]'") from None
        from arcflow.sampling.open import size_of

        side = self.max_side or min(4 * size_of(self.model, None, None)[0], 2048)
        if self.fleet.ray:
            self._on_ray(side)
        else:
            self._here(side)

    def _here(self, side: int) -> None:
        """One process."""
        from arcflow.serving.app import Limits, create_app
        from arcflow.serving.engine import Engine
        from arcflow.serving.host import serve
        from arcflow.serving.offer import StudioSetup
        from arcflow.serving.studio import Studio

        setup = StudioSetup(
            model=self.model,
            adapters=_named(self.adapter, "adapter") or {SHIPPED: SHIPPED},
            styles=_named(self.lora, "lora"),
            teacher_lora=self.teacher_lora,
            device=self.device,
            dtype=self.dtype,
            fit=self.fit,
            max_batch=self.max_batch,
        )
        engine = Engine(lambda: Studio(setup), max_waiting=self.max_waiting)
        key = self.api_key or os.environ.get("ARCFLOW_API_KEY") or None
        app = create_app(engine, api_key=key, limits=Limits(side=side, pixels=side * side))
        serve(app, engine, self.host, self.port, _say)

    def _on_ray(self, side: int) -> None:
        """Replicas of Ray Serve."""
        from arcflow.system.cluster import need_ray

        need_ray("serve", self.fleet.address)
        from arcflow.serving.on_ray import Hosting, serve_on_ray

        hosting = Hosting(
            model=self.model,
            adapters=_named(self.adapter, "adapter") or {SHIPPED: SHIPPED},
            styles=_named(self.lora, "lora"),
            teacher_lora=self.teacher_lora,
            device=self.device,
            dtype=self.dtype,
            fit=self.fit,
            max_batch=self.max_batch,
            max_waiting=self.max_waiting,
            max_side=side,
            api_key=self.api_key or os.environ.get("ARCFLOW_API_KEY") or None,
            replicas=self.fleet.workers or 1,
            max_replicas=self.max_workers,
            cpus=self.fleet.cpus,
            gpus=self.fleet.gpus,
        )
        serve_on_ray(hosting, self.host, self.port, self.fleet.address, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _named(words: tuple[str, ...], option: str) -> dict[str, str]:
    """Paths by name; a path alone is named by its last part."""
    named = dict[str, str]()
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            name = word.rstrip("/").replace(":", "/").rpartition("/")[2].removesuffix(".safetensors")
            path = word
        if not name or not path or name in named:
            raise ValueError(f"--{option} {word}: expected NAME=PATH with a name of its own")
        named[name] = path
    return named
