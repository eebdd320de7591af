"""The application: OpenAI's routes in front of an engine, and a page to look at.

`create_app(engine)` is all of it; whoever hosts it, one process or many, hosts the same application. It checks, asks
the engine, waits, and writes the answer; it never touches the pipeline.
"""

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Annotated

import numpy as np
from fastapi import Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from jaxtyping import UInt8
from PIL import Image
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arcflow import __version__
from arcflow.serving import schema
from arcflow.serving.engine import Engine, Full, Job, NotReady, OutOfMemory
from arcflow.serving.errors import Refused, refusal
from arcflow.serving.order import Order, Picture, Piece, Task
from arcflow.serving.pictures import MOST_BYTES, fitted, from_data_uri, holes, read_picture, within, written
from arcflow.serving.studio import TEACHER, Offer, taken

Json = dict[str, object]
"""What an answer or a request says."""

Pixels = UInt8[np.ndarray, "height width 3"]

News = Future[Picture] | tuple[int, Pixels]
"""Of one picture of a stream: that it is done, or the steps taken and what it would be."""

Event = tuple[int, News]
"""Place of a picture in its stream, and its news."""

MOST_JSON = 1 << 20
"""Bytes of a request without pictures."""

MOST_FORM = 64 << 20
"""Bytes of a request with pictures."""

MOST_IMAGES = 4
"""Pictures that one edit may read."""

POLL = 0.1
"""Seconds between two looks whether a client is still there."""

NEGATIVE = 2.0
"""Guidance against a negative prompt, where a request does not say."""

STRENGTH = 0.6
"""How much of the noise a picture to be changed starts from, where a request does not say."""

CHANGE_STEPS = 4
"""Least steps of a change, where a request does not say: strength counts in whole ones."""

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask at most."""

    side: int = 2048
    """Pixels of the longer side."""
    pixels: int = 2048 * 2048
    steps: int = schema.MOST_STEPS


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
        summary="Pictures in a few steps, in OpenAI's protocol.",
        lifespan=alive,
        redoc_url=None,
        responses={400: {"description": "The request is wrong; param names the field."}},
    )
    app.state.engine = engine
    desk = Desk(engine, limits or Limits())
    app.add_middleware(Bounded)
    app.add_middleware(Counted, engine=engine)
    _tell_errors(app)
    guarded = [Depends(partial(_guard, api_key.encode()))] if api_key else []

    @app.post("/v1/images/generations", dependencies=guarded, tags=["OpenAI"])
    async def generations(asked: Annotated[schema.Generation, Body()], request: Request) -> Response:
        """Pictures from a prompt. With `stream` as server-sent events, the first after the first step."""
        offer = _offer(engine)
        order, pieces = desk.order(offer, asked, [], None)
        return await desk.answer(request, asked, order, pieces, "image_generation")

    @app.post("/v1/images/edits", dependencies=guarded, tags=["OpenAI"])
    async def edits(request: Request) -> Response:
        """Pictures from pictures: a form with `image` (or several `image[]`) and `mask`, or JSON with data URIs."""
        offer = _offer(engine)
        asked, images, mask = await _edit(request)
        order, pieces = desk.order(offer, asked, images, mask)
        return await desk.answer(request, asked, order, pieces, "image_edit")

    @app.get("/v1/models", dependencies=guarded, tags=["OpenAI"])
    async def models() -> Json:
        """The adapters by name, and the teacher."""
        return {"object": "list", "data": [_model(name, desk.born) for name in _offer(engine).models]}

    @app.get("/v1/models/{name}", dependencies=guarded, tags=["OpenAI"])
    async def model(name: str) -> Json:
        """One of them."""
        return _model(_named(_offer(engine), name), desk.born)

    @app.get("/health", tags=["operation"])
    async def health() -> JSONResponse:
        """200 when pictures can be drawn; 503 while the model loads, and while the server drains."""
        alive = engine.state == "ready" and engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else engine.state}, 200 if alive else 503)

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info", tags=["operation"])
    async def info() -> Json:
        """What can be drawn: models with their steps, styles, sizes, tasks."""
        offer = _offer(engine)
        return {
            "version": __version__,
            "model": offer.model,
            "models": [
                {"id": name, "steps": offer.steps[name], "guidance": offer.guidance[name]} for name in offer.models
            ],
            "styles": offer.styles,
            "size": {"height": offer.height, "width": offer.width, "multiple": offer.multiple},
            "tasks": offer.tasks,
            "negative": offer.negative,
            "key": api_key is not None,
        }

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = await asyncio.to_thread(resources.files("arcflow.serving").joinpath("page.html").read_text, "utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    return app


class Desk:
    """Where requests become jobs, and pictures answers."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits, self.born = engine, limits, int(time.time())

    def order(
        self, offer: Offer, asked: schema.Asked, images: Sequence[Image.Image], mask: Image.Image | None
    ) -> tuple[Order, list[Piece]]:
        """What a request asks for, checked against what there is."""
        model = _named(offer, asked.model or offer.models[0])
        task = _task(offer, asked, images, mask)
        if task == "edit":  # no more than the model draws itself: what it reads beside the text costs as much
            images = [within(image, offer.height * offer.width) for image in images]
        height, width = self._size(offer, asked.size, images if task != "generate" else ())
        strength = asked.strength if isinstance(asked, schema.Edit) else None
        if strength is not None and task == "edit":
            raise Refused("this model reads the picture whole and knows no strength; leave it out", param="strength")
        changes = task in ("vary", "inpaint")
        usual = max(offer.steps[model], CHANGE_STEPS) if changes else offer.steps[model]
        steps = asked.num_inference_steps or usual
        if steps > self.limits.steps:
            raise Refused(f"{steps} steps: expected at most {self.limits.steps}", param="num_inference_steps")
        if asked.true_cfg_scale is not None and asked.negative_prompt is None:
            raise Refused("true_cfg_scale guides away from a negative prompt: give one", param="true_cfg_scale")
        if asked.negative_prompt is not None and not offer.negative:
            raise Refused("this model takes no negative prompt; leave it out", param="negative_prompt")
        guidance = offer.guidance[model] if asked.guidance_scale is None else asked.guidance_scale
        if guidance is None and model == TEACHER:
            guidance = next((g for g in offer.guidance.values() if g is not None), None)
        order = Order(
            height=height,
            width=width,
            steps=steps,
            model=model,
            guidance=guidance,
            negative=None if asked.negative_prompt is None else asked.true_cfg_scale or NEGATIVE,
            styles=_styles(offer, asked.lora or {}),
            task=task,
            strength=(STRENGTH if strength is None else strength) if changes else 1.0,
            pictures=tuple(image.size for image in images) if task == "edit" else (),
        )
        if taken(order) < 1:
            raise Refused(
                f"strength {order.strength} of {steps} steps leaves none: expected at least {1 / steps:.3g}",
                param="strength",
            )
        if asked.n > self.engine.max_waiting:  # the queue would be too full for ever
            raise Refused(f"n {asked.n}: this server's queue holds {self.engine.max_waiting} pictures", param="n")
        first = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        if first + asked.n > schema.SEEDS:
            raise Refused(f"seeds {first} to {first + asked.n - 1}: expected them below 2^63", param="seed")
        seen = tuple(fitted(image, height, width) if changes else image for image in images)
        pieces = [
            Piece(
                prompt=asked.prompt,
                seed=first + i,
                negative=asked.negative_prompt or "",
                images=seen,
                mask=holes(mask, height, width) if mask is not None and task == "inpaint" else None,
            )
            for i in range(asked.n)
        ]
        return order, pieces

    def _size(self, offer: Offer, size: str, images: Sequence[Image.Image]) -> tuple[int, int]:
        """Height and width. "auto" is the model's own, in the shape of the picture to be changed."""
        if size == "auto":
            if not images:
                return offer.height, offer.width
            wide, high = images[0].size
            scale = (offer.height * offer.width / (wide * high)) ** 0.5

            most = max(self.limits.side // offer.multiple, 1)

            def side(pixels: int) -> int:
                return min(max(round(pixels * scale / offer.multiple), 1), most) * offer.multiple

            return side(high), side(wide)
        width, height = map(int, size.split("x"))
        if width % offer.multiple or height % offer.multiple or not width or not height:
            raise Refused(f"size {size}: expected multiples of {offer.multiple}", param="size", code="invalid_size")
        if max(width, height) > self.limits.side or width * height > self.limits.pixels:
            raise Refused(
                f"size {size}: expected sides of at most {self.limits.side} and {self.limits.pixels} pixels",
                param="size",
                code="invalid_size",
            )
        return height, width

    async def answer(
        self, request: Request, asked: schema.Asked, order: Order, pieces: list[Piece], event: str
    ) -> Response:
        """The pictures, or the events of them."""
        if asked.stream:
            return await self._streamed(request, asked, order, pieces, event)
        jobs = [Job(order, piece) for piece in pieces]
        self.engine.submit(jobs)
        try:
            pictures = await _waited(request, jobs)
        finally:
            self.engine.leave(jobs)
        files = await asyncio.gather(
            *(
                asyncio.to_thread(self._file, asked, order, piece, picture)
                for piece, picture in zip(pieces, pictures, strict=True)
            )
        )
        data = [
            {"b64_json": file, "seed": piece.seed, **_cost(picture)}
            for file, piece, picture in zip(files, pieces, pictures, strict=True)
        ]
        return JSONResponse(
            {"created": int(time.time()), "data": data, **_facts(asked, order), "usage": _usage(pictures)}
        )

    async def _streamed(
        self, request: Request, asked: schema.Asked, order: Order, pieces: list[Piece], event: str
    ) -> StreamingResponse:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(place: int, news: News) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, (place, news))
            except RuntimeError:  # the loop has ended, and with it the client
                pass

        def glimpse(place: int, step: int, image: Pixels) -> None:
            if step <= (asked.partial_images or 0):
                tell(place, (step, image))

        wanted = bool(asked.partial_images)
        jobs = [Job(order, piece, partial(glimpse, i) if wanted else None) for i, piece in enumerate(pieces)]
        for place, job in enumerate(jobs):
            job.future.add_done_callback(partial(tell, place))
        self.engine.submit(jobs)
        try:
            first = await _news(request, events)
            error = first[1].exception() if isinstance(first[1], Future) else None
            if error is not None:  # what fails before anything is sent has a status of its own
                raise refusal(error)
        except BaseException:
            self.engine.leave(jobs)
            raise

        async def lines() -> AsyncIterator[str]:
            pictures, news = list[Picture](), first
            try:
                while True:
                    place, what = news
                    if isinstance(what, Future):
                        pictures.append(what.result())
                        yield await self._completed(asked, order, pieces[place], pictures[-1], event)
                    else:
                        step, image = what
                        yield await self._partial(asked, order, pieces[place], step, image, event)
                    if len(pictures) == len(jobs):
                        return
                    news = await events.get()
            except Exception as error:
                yield f"event: error\ndata: {json.dumps(refusal(error).body)}\n\n"
            finally:
                self.engine.leave(jobs)

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    async def _partial(
        self, asked: schema.Asked, order: Order, piece: Piece, step: int, image: Pixels, event: str
    ) -> str:
        file = await asyncio.to_thread(written, image, asked.output_format, asked.output_compression, {})
        return _event(
            f"{event}.partial_image",
            {
                "b64_json": base64.b64encode(file).decode(),
                "partial_image_index": step - 1,
                "created_at": int(time.time()),
                "seed": piece.seed,
                **_facts(asked, order),
            },
        )

    async def _completed(self, asked: schema.Asked, order: Order, piece: Piece, picture: Picture, event: str) -> str:
        return _event(
            f"{event}.completed",
            {
                "b64_json": await asyncio.to_thread(self._file, asked, order, piece, picture),
                "created_at": int(time.time()),
                "seed": piece.seed,
                "usage": _usage([picture]),
                **_cost(picture),
                **_facts(asked, order),
            },
        )

    def _file(self, asked: schema.Asked, order: Order, piece: Piece, picture: Picture) -> str:
        """The picture's file in base64."""
        offer = self.engine.offer
        recipe = {
            "prompt": piece.prompt,
            "seed": piece.seed,
            "steps": order.steps,
            "height": order.height,
            "width": order.width,
            "guidance": order.guidance,
            "model": offer.model if offer else "",
            "adapter": order.model,
            "version": __version__,
            **({"negative_prompt": piece.negative, "true_cfg_scale": order.negative} if order.negative else {}),
            **({"styles": dict(order.styles)} if order.styles else {}),
            **({"task": order.task, "strength": order.strength} if order.task != "generate" else {}),
        }
        return base64.b64encode(written(picture.image, asked.output_format, asked.output_compression, recipe)).decode()


# --- reading a request


def _offer(engine: Engine) -> Offer:
    if engine.offer is None or engine.state != "ready":
        raise NotReady(engine.state)
    return engine.offer


def _named(offer: Offer, name: str) -> str:
    if name not in offer.models:
        known = ", ".join(offer.models)
        raise Refused(f"no model {name!r}: expected one of {known}", status=404, param="model", code="model_not_found")
    return name


def _model(name: str, born: int) -> Json:
    return {"id": name, "object": "model", "created": born, "owned_by": "arcflow"}


def _styles(offer: Offer, asked: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    for name in asked:
        if name not in offer.styles:
            known = ", ".join(offer.styles) or "none are loaded"
            raise Refused(f"no style {name!r}: expected one of these: {known}", param="lora")
    return tuple(sorted((name, strength) for name, strength in asked.items() if strength))


def _task(offer: Offer, asked: schema.Asked, images: Sequence[Image.Image], mask: Image.Image | None) -> Task:
    if not isinstance(asked, schema.Edit):
        return "generate"
    if "edit" in offer.tasks:
        if mask is not None:
            raise Refused("this model edits by words and takes no mask; leave it out", param="mask")
        return "edit"
    if len(images) > 1:
        raise Refused(f"{len(images)} pictures: this model starts from one alone", param="image")
    return "vary" if mask is None else "inpaint"


async def _edit(request: Request) -> tuple[schema.Edit, list[Image.Image], Image.Image | None]:
    """The fields, the pictures and the mask of an edit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        fields, files, masks = _from_json(await request.body())
    elif kind == "multipart/form-data":
        async with request.form(max_files=MOST_IMAGES + 1, max_fields=64, max_part_size=MOST_JSON) as form:
            fields, files, masks = await _from_form(form)
    else:
        raise Refused(f"content type {kind or 'missing'!r}: expected multipart/form-data or application/json")
    if not 1 <= len(files) <= MOST_IMAGES:
        raise Refused(f"{len(files)} pictures: expected 1 to {MOST_IMAGES}", param="image")
    asked = schema.Edit.model_validate(fields)
    try:
        images = [await asyncio.to_thread(read_picture, file) for file in files]
    except ValueError as error:
        raise Refused(str(error), param="image", code="invalid_image") from None
    try:
        mask = await asyncio.to_thread(read_picture, masks[0]) if masks else None
    except ValueError as error:
        raise Refused(str(error), param="mask", code="invalid_image") from None
    return asked, images, mask


def _from_json(body: bytes) -> tuple[Json, list[bytes], list[bytes]]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is no JSON") from None
    if not isinstance(fields, dict):
        raise Refused("the body is no JSON object")
    images = fields.pop("image", None) or fields.pop("images", None) or []
    images = images if isinstance(images, list) else [images]
    mask = fields.pop("mask", None)
    texts = [[_address(one) for one in images], [_address(mask)] if mask is not None else []]
    try:
        files, masks = ([from_data_uri(text) for text in some] for some in texts)
    except ValueError as error:
        raise Refused(str(error), param="image", code="invalid_image") from None
    return fields, files, masks


def _address(image: object) -> str:
    """A picture in JSON: words, or an object with them under `image_url`."""
    text = image.get("image_url") if isinstance(image, dict) else image
    if not isinstance(text, str):
        raise Refused("a picture in JSON: expected data:image/png;base64,...", param="image", code="invalid_image")
    return text


async def _from_form(form: FormData) -> tuple[Json, list[bytes], list[bytes]]:
    fields, files, masks = Json(), list[bytes](), list[bytes]()
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            data = await value.read(MOST_BYTES + 1)
            if name in ("image", "image[]"):
                files.append(data)
            elif name == "mask":
                masks.append(data)
            else:
                raise Refused(f"a file named {name!r}: expected image, image[] or mask", param=name)
        else:
            fields[name] = value
    return fields, files, masks


# --- writing an answer


async def _waited(request: Request, jobs: Sequence[Job]) -> list[Picture]:
    """The pictures of these jobs, as long as the client is there."""
    together = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    together.add_done_callback(lambda done: done.cancelled() or done.exception())  # also when nobody asks any more
    try:
        while True:
            done, _ = await asyncio.wait([together], timeout=POLL)
            if not done and await request.is_disconnected():
                raise Left
            if done and (error := together.exception()) is not None:
                raise error if isinstance(error, CancelledError) else refusal(error)
            if done:
                return together.result()
    finally:
        together.cancel()


async def _news(request: Request, events: asyncio.Queue[Event]) -> Event:
    """The next of the events, as long as the client is there."""
    while True:
        try:
            return await asyncio.wait_for(events.get(), POLL)
        except TimeoutError:
            if await request.is_disconnected():
                raise Left from None


class Left(Exception):
    """The client has gone; nobody reads the answer."""


def _facts(asked: schema.Asked, order: Order) -> Json:
    return {
        "size": f"{order.width}x{order.height}",
        "quality": asked.quality if asked.quality in ("low", "medium", "high") else "auto",
        "background": "opaque",
        "output_format": asked.output_format,
    }


def _cost(picture: Picture) -> Json:
    """What a picture took; seconds are those of its batch."""
    seconds = {part: round(value, 6) for part, value in (*picture.seconds.items(), ("waited", picture.waited))}
    return {"seconds": seconds, "batch": picture.batch, "calls": picture.calls}


def _usage(pictures: Sequence[Picture]) -> Json:
    """Tokens that the network read and made: positions of text and of picture."""
    read, made = (sum(getattr(p, name) for p in pictures) for name in ("text_tokens", "image_tokens"))
    details = {"text_tokens": read, "image_tokens": 0}
    return {"input_tokens": read, "output_tokens": made, "total_tokens": read + made, "input_tokens_details": details}


def _event(name: str, body: Mapping[str, object]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **body})}\n\n"


def _guard(key: bytes, request: Request) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key):
        raise Refused(
            "the API key is missing or wrong: send Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _tell_errors(app: FastAPI) -> None:
    """Every error of the application in OpenAI's shape."""

    async def told(request: Request, error: Exception) -> Response:
        if isinstance(error, Left | CancelledError):
            return Response(status_code=499)
        return refusal(error).answer

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        return _invalid(error.errors()).answer

    async def plain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Refused(str(error.detail), status=error.status_code, headers=error.headers).answer

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
    for kind in (Refused, Full, NotReady, OutOfMemory, Left, CancelledError, Exception):
        app.add_exception_handler(kind, told)


def _invalid(errors: Sequence[ErrorDetails]) -> Refused:
    """The first thing that is wrong with the fields."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    name = where[0] if where else None
    if first["type"] == "extra_forbidden":
        return Refused(f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")
    if first["type"] in ("json_invalid", "model_attributes_type"):
        return Refused("the body is no JSON object; send Content-Type: application/json")
    given = f" (given: {first['input']!r:.100})" if name and isinstance(first.get("input"), str | int | float) else ""
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return Refused(f"{name or 'body'}: {first['msg']}{given}", param=name, code=code)


# --- around every request


class Bounded:
    """Refuses bodies that are larger than their route needs, said or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most = MOST_FORM if scope["path"].endswith("/edits") else MOST_JSON
        headers = dict(scope["headers"])
        said = headers.get(b"content-length", b"0")
        large = Refused(f"the body has more than {most} bytes", status=413, code="body_too_large")
        if said.isdigit() and int(said) > most:
            return await large.answer(scope, receive, send)
        read, told = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise large
            return message

        async def corrected(message: Message) -> None:
            nonlocal told
            if read <= most:
                await send(message)
            elif not told:  # whatever the application made of the cut
                told = True
                await large.answer(scope, receive, send)

        await self.app(scope, counted, corrected)


class Counted:
    """Counts answers by route and status."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self.app, self.engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 499

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.engine.metrics.requests.labels(route, str(status)).inc()
