"""Around every request: bodies of bounded size, the API key, counters, and every error in OpenAI's shape."""

import hmac
from collections.abc import Sequence
from concurrent.futures import CancelledError

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arcflow.serving.answers import Left
from arcflow.serving.engine import Engine, Full, NotReady, OutOfMemory
from arcflow.serving.errors import Refused, refusal
from arcflow.serving.reading import MOST_FORM, MOST_JSON


def guard(key: bytes, request: Request) -> None:
    """Refuse a request without this key."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key):
        raise Refused(
            "the API key is missing or wrong: send Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def tell_errors(app: FastAPI) -> None:
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
        self.app = app
        self.engine = engine

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
