"""A live server on loopback, and a studio of toys for its engine."""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from PIL import Image

from arcflow.serving.app import Limits, create_app
from arcflow.serving.engine import Engine
from arcflow.serving.host import Server
from arcflow.serving.offer import Gone, Offer, StudioSetup, Watch
from arcflow.serving.order import Drawn, Order, Piece
from arcflow.serving.studio import Studio
from arcflow.serving.texts import Texts

OFFER = Offer(
    model="toy",
    models=("toy", "teacher"),
    steps={"toy": 2, "teacher": 50},
    guidance={"toy": 3.5, "teacher": None},
    styles=(),
    height=64,
    width=64,
    multiple=16,
    tasks=("generate",),
    negative=True,
)
ORDER = Order(height=64, width=64, steps=2, model="toy")


class Toys:
    """Draws a flat image of the seed's shade, once it is let; what it drew stands in `batches`."""

    def __init__(self, before: Callable[[Sequence[Piece]], None] = lambda pieces: None, most: int = 8) -> None:
        self.before, self.most = before, most
        self.texts = Texts(1)
        self.batches = list[tuple[Order, list[int]]]()

    def offer(self) -> Offer:
        return OFFER

    def room(self, order: Order) -> int:
        return self.most

    def shrink(self, order: Order) -> bool:
        smaller, self.most = self.most > 1, max(self.most // 2, 1)
        return smaller

    def draw(self, order: Order, pieces: Sequence[Piece], watch: Watch | None = None) -> list[Drawn]:
        self.before(pieces)
        if watch is not None and not watch.wanted():
            raise Gone
        self.batches.append((order, [piece.seed for piece in pieces]))
        for show in watch.partial.values() if watch else ():
            show(1, np.zeros((order.height, order.width, 3), np.uint8))
        return [
            Drawn(
                image=np.full((order.height, order.width, 3), piece.seed % 256, np.uint8),
                seconds={"transformer": 0.0},
                batch=len(pieces),
                calls=order.steps,
                text_tokens=16,
                image_tokens=16,
            )
            for piece in pieces
        ]


@contextmanager
def serving(opened: Callable, *, max_waiting: int = 64, api_key: str | None = None) -> Iterator[tuple[Server, Engine]]:
    """A live server that is ready."""
    engine = Engine(opened, max_waiting=max_waiting)
    with Server(create_app(engine, api_key=api_key, limits=Limits(side=256)), "127.0.0.1", 0) as server:
        engine.ready(120.0)
        yield server, engine


def small_model(max_batch: int = 8) -> Studio:
    """The shipped model, as `arcflow serve` opens it."""
    return Studio(StudioSetup(device="cpu", max_batch=max_batch))


def picture(item) -> np.ndarray:
    """The pixels of an answer."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(item.b64_json))).convert("RGB"))


def upload(color: str = "red", size: tuple[int, int] = (64, 64), **more) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.new("RGB", size, color, **more).save(file, format="PNG")
    return file.getvalue()


def ordered(**changes) -> Order:
    return replace(ORDER, **changes)
