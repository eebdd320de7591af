"""The application: OpenAI's routes in front of an engine, and a page to look at.

`create_app(engine)` is all of it; whoever hosts it, one process or many, hosts the same application. It checks, asks
the engine, waits, and writes the answer; it never touches the pipeline.

    desk, reading    a request becomes an order, held against what there is
    answers          what is drawn becomes an answer, whole or as events
    openai           the routes under /v1
    operation        health, counters, facts, the page
    around           size of bodies, API key, counters, errors
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI

from arcflow import __version__
from arcflow.serving.around import Bounded, Counted, guard, tell_errors
from arcflow.serving.desk import Limits
from arcflow.serving.engine import Engine
from arcflow.serving.openai import openai_routes
from arcflow.serving.operation import operation_routes


def create_app(engine: Engine, *, api_key: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The application of one engine, which it starts and closes. With `api_key` the routes under /v1 want it."""

    @asynccontextmanager
    async def alive(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="arcflow",
        version=__version__,
        summary="Images in a few steps, in OpenAI's protocol.",
        lifespan=alive,
        redoc_url=None,
        responses={400: {"description": "The request is wrong; param names the field."}},
    )
    app.state.engine = engine
    app.add_middleware(Bounded)
    app.add_middleware(Counted, engine=engine)
    tell_errors(app)
    guarded = [Depends(partial(guard, api_key.encode()))] if api_key else []

    app.include_router(openai_routes(engine, limits or Limits()), dependencies=guarded)
    app.include_router(operation_routes(engine, key=api_key is not None))
    return app
