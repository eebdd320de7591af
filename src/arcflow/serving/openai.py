"""OpenAI's routes: images from a prompt, images from images, and the models."""

import time
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from arcflow.serving import schema
from arcflow.serving.answers import Answers
from arcflow.serving.desk import Desk, Limits, known_model, offer_of
from arcflow.serving.engine import Engine
from arcflow.serving.reading import Json, read_edit


def openai_routes(engine: Engine, limits: Limits) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(tags=["OpenAI"])
    desk = Desk(engine, limits)
    answers = Answers(engine)
    born = int(time.time())

    @routes.post("/v1/images/generations")
    async def generations(asked: Annotated[schema.Generation, Body()], request: Request) -> Response:
        """Images from a prompt. With `stream` as server-sent events, the first after the first step."""
        offer = offer_of(engine)
        order, pieces = desk.order(offer, asked, [], None)
        return await answers.of(request, asked, order, pieces, "image_generation")

    @routes.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        """Images from images: a form with `image` (or several `image[]`) and `mask`, or JSON with data URIs."""
        offer = offer_of(engine)
        asked, images, mask = await read_edit(request)
        order, pieces = desk.order(offer, asked, images, mask)
        return await answers.of(request, asked, order, pieces, "image_edit")

    @routes.get("/v1/models")
    async def models() -> Json:
        """The adapters by name, and the teacher."""
        return {"object": "list", "data": [_model(name, born) for name in offer_of(engine).models]}

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> Json:
        """One of them."""
        return _model(known_model(offer_of(engine), name), born)

    return routes


def _model(name: str, born: int) -> Json:
    return {"id": name, "object": "model", "created": born, "owned_by": "arcflow"}
