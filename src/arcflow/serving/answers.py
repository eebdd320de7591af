"""What is drawn, as answers: all of it at once, or as server-sent events while it comes; both only as long as the
client is there."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from jaxtyping import UInt8

from arcflow import __version__
from arcflow.serving import schema
from arcflow.serving.engine import Engine, WaitingImage
from arcflow.serving.errors import refusal
from arcflow.serving.images import written
from arcflow.serving.order import Drawn, Order, Piece
from arcflow.serving.reading import Json

Pixels = UInt8[np.ndarray, "height width 3"]

News = Future[Drawn] | tuple[int, Pixels]
"""What is new of an image of a stream: that it is done, or the steps taken and what it would be."""

Event = tuple[int, News]
"""Place of an image in its stream, and its news."""

POLL = 0.1
"""Seconds between two looks whether a client is still there."""


class Left(Exception):
    """The client has gone; nobody reads the answer."""


class Answers:
    """Answers of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def of(
        self, request: Request, asked: schema.Asked, order: Order, pieces: list[Piece], event: str
    ) -> Response:
        """The images, or the events of them."""
        if asked.stream:
            return await self._streamed(request, asked, order, pieces, event)
        jobs = [WaitingImage(order, piece) for piece in pieces]
        self.engine.submit(jobs)
        try:
            drawn = await _waited(request, jobs)
        finally:
            self.engine.leave(jobs)
        files = await asyncio.gather(
            *(asyncio.to_thread(self._file, asked, order, piece, one) for piece, one in zip(pieces, drawn, strict=True))
        )
        data = [
            {"b64_json": file, "seed": piece.seed, **_cost(one)}
            for file, piece, one in zip(files, pieces, drawn, strict=True)
        ]
        return JSONResponse({"created": int(time.time()), "data": data, **_facts(asked, order), "usage": _usage(drawn)})

    async def _streamed(
        self, request: Request, asked: schema.Asked, order: Order, pieces: list[Piece], event: str
    ) -> StreamingResponse:
        loop = asyncio.get_running_loop()
        events = asyncio.Queue[Event]()

        def tell(place: int, news: News) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, (place, news))
            except RuntimeError:  # the loop has ended, and with it the client
                pass

        def glimpse(place: int, step: int, image: Pixels) -> None:
            if step <= (asked.partial_images or 0):
                tell(place, (step, image))

        wanted = bool(asked.partial_images)
        jobs = [WaitingImage(order, piece, partial(glimpse, i) if wanted else None) for i, piece in enumerate(pieces)]
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
            drawn = list[Drawn]()
            news = first
            try:
                while True:
                    place, what = news
                    if isinstance(what, Future):
                        drawn.append(what.result())
                        yield await self._completed(asked, order, pieces[place], drawn[-1], event)
                    else:
                        step, image = what
                        yield await self._partial(asked, order, pieces[place], step, image, event)
                    if len(drawn) == len(jobs):
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

    async def _completed(self, asked: schema.Asked, order: Order, piece: Piece, drawn: Drawn, event: str) -> str:
        return _event(
            f"{event}.completed",
            {
                "b64_json": await asyncio.to_thread(self._file, asked, order, piece, drawn),
                "created_at": int(time.time()),
                "seed": piece.seed,
                "usage": _usage([drawn]),
                **_cost(drawn),
                **_facts(asked, order),
            },
        )

    def _file(self, asked: schema.Asked, order: Order, piece: Piece, drawn: Drawn) -> str:
        """The image's file in base64."""
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
        return base64.b64encode(written(drawn.image, asked.output_format, asked.output_compression, recipe)).decode()


async def _waited(request: Request, jobs: Sequence[WaitingImage]) -> list[Drawn]:
    """The images of these jobs, as long as the client is there."""
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


def _facts(asked: schema.Asked, order: Order) -> Json:
    return {
        "size": f"{order.width}x{order.height}",
        "quality": asked.quality if asked.quality in ("low", "medium", "high") else "auto",
        "background": "opaque",
        "output_format": asked.output_format,
    }


def _cost(drawn: Drawn) -> Json:
    """What an image took; seconds are those of its batch."""
    seconds = {part: round(value, 6) for part, value in (*drawn.seconds.items(), ("waited", drawn.waited))}
    return {"seconds": seconds, "batch": drawn.batch, "calls": drawn.calls}


def _usage(drawn: Sequence[Drawn]) -> Json:
    """Tokens that the network read and made: positions of text and of image."""
    read, made = (sum(getattr(p, name) for p in drawn) for name in ("text_tokens", "image_tokens"))
    details = {"text_tokens": read, "image_tokens": 0}
    return {"input_tokens": read, "output_tokens": made, "total_tokens": read + made, "input_tokens_details": details}


def _event(name: str, body: Mapping[str, object]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **body})}\n\n"
