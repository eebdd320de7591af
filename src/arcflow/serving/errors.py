"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

The official client tries again on 408, 409, 429 and from 500 on, after `Retry-After`; a user's error is a 400, a 401, a
404 or a 413, which it raises at once.
"""

from collections.abc import Mapping

from fastapi.responses import JSONResponse

from arcflow.serving.engine import Full, NotReady, OutOfMemory


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def answer(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def refusal(error: BaseException) -> Refused:
    """How a client is told of this error. What went wrong inside stays inside."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused(str(error), status=429, code="queue_full", headers={"Retry-After": str(error.seconds)})
    if isinstance(error, NotReady):
        return Refused(str(error), status=503, code=error.state, headers={"Retry-After": "2"})
    if isinstance(error, OutOfMemory):
        message = f"{error}: ask for a smaller one, or try again when fewer are drawn"
        return Refused(message, status=503, code="out_of_memory", headers={"Retry-After": "5"})
    if isinstance(error, ValueError):
        return Refused(str(error).splitlines()[0] if str(error) else "the request cannot be drawn")
    return Refused("the image could not be drawn; the server's log says why", status=500, code="internal_error")
