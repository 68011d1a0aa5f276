"""What is decided before a request is looked at: its key and its size."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from moekit.serve.http.errors import ApiError

OPEN_PATHS = ("/health",)


class Guard:
    """ASGI middleware that refuses requests without the key, and bodies that are too large.

    Args:
        app: behind it; gets each body in one piece.
        told: makes the answer of an error.
        api_key: that requests must bring as a bearer token; None: none.
        max_body_bytes: of a request's body.
    """

    def __init__(self, app: Any, told: Callable[[ApiError], Response], api_key: str | None, max_body_bytes: int):
        self.app, self.told, self.api_key, self.max_body_bytes = app, told, api_key, max_body_bytes

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Answer a request, or let it through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not self._has_key(scope["path"], headers.get(b"authorization", b"")):
            await self.told(ApiError(401, "this server wants its API key", code="invalid_api_key"))(
                scope, receive, send
            )
            return
        body = None
        if not (length.isdigit() and int(length) > self.max_body_bytes):
            body = await self._body(receive)
        if body is None:
            error = ApiError(413, f"a request has at most {self.max_body_bytes:,} bytes", code="too_large")
            await self.told(error)(scope, receive, send)
            return
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return given.pop() if given else await receive()

        await self.app(scope, again, send)

    def _has_key(self, path: str, authorization: bytes) -> bool:
        if self.api_key is None or path in OPEN_PATHS:
            return True
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.api_key.encode())

    async def _body(self, receive: Any) -> bytes | None:
        """The whole body; None if it is too large."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                return None
            if not message.get("more_body", False):
                return body
