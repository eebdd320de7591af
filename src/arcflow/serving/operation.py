"""What whoever runs a server asks it: whether it is well, its counters, what it draws; and the page to look at."""

import asyncio
from importlib import resources

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, JSONResponse

from arcflow import __version__
from arcflow.serving.desk import offer_of
from arcflow.serving.engine import Engine
from arcflow.serving.reading import Json

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


def operation_routes(engine: Engine, *, key: bool) -> APIRouter:
    """The routes beside OpenAI's; `key` says whether those want one."""
    routes = APIRouter(tags=["operation"])

    @routes.get("/health")
    async def health() -> JSONResponse:
        """200 when images can be drawn; 503 while the model loads, and while the server drains."""
        alive = engine.state == "ready" and engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else engine.state}, 200 if alive else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/info")
    async def info() -> Json:
        """What can be drawn: models with their steps, styles, sizes, tasks."""
        offer = offer_of(engine)
        return {
            "version": __version__,
            "model": offer.model,
            "models": [
                {
                    "id": name,
                    "steps": offer.steps[name],
                    "guidance": offer.guidance[name],
                    **({"guidance_range": offer.ranges[name]} if name in offer.ranges else {}),
                }
                for name in offer.models
            ],
            "styles": offer.styles,
            "size": {"height": offer.height, "width": offer.width, "multiple": offer.multiple},
            "tasks": offer.tasks,
            "negative": offer.negative,
            "key": key,
        }

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = await asyncio.to_thread(resources.files("arcflow.serving").joinpath("page.html").read_text, "utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    return routes
