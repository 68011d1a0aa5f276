"""Errors in the shape of OpenAI's API, which its clients turn into their exceptions."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from moekit.errors import DataError, RecipeError, UserError
from moekit.serve.scheduler import ClosedError, QueueFullError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the field concerned.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_s)})
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, RecipeError | DataError):
        param = str(error.where) if str(error.where).isidentifier() else None
        long = isinstance(error, DataError) and "length" in error.problem
        return ApiError(400, str(error), param, "context_length_exceeded" if long else None)
    if isinstance(error, UserError):
        return ApiError(500, str(error), code=error.kind)
    return ApiError(500, f"{type(error).__name__}: {error}", code="internal")
