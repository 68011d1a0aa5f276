"""A small server for one page and one question: the report, and which experts a typed text chooses.

It is meant for the machine that it runs on. A page of another site must not be able to ask it: a request names this
server by an address or by the host's own name, never by a domain name that someone else may point here (DNS rebinding),
and a question comes from the page itself (Origin) as JSON (which a foreign form cannot send).
"""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

from moekit.errors import OutputError, UserError
from moekit.report.pack import to_plain
from moekit.report.page import policy, render

TEXT_CHARACTERS = 16_000
BODY_BYTES = 8 * TEXT_CHARACTERS  # a character is at most 6 bytes of JSON, most are 1
TIMEOUT_S = 30

TraceText = Callable[[str], Mapping[str, Any]]


class ReportServer(ThreadingHTTPServer):
    """Serves a report; `serve_forever` runs it, `shutdown` ends it.

    Args:
        payload: from `moekit.report.collect`.
        trace_text: answers typed texts; None leaves that part of the page out.
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        OutputError: the address cannot be listened on.
    """

    daemon_threads = True

    def __init__(
        self, payload: Mapping[str, Any], trace_text: TraceText | None = None, host: str = "127.0.0.1", port: int = 0
    ):
        live = {"live": {"limit": TEXT_CHARACTERS}} if trace_text else {}
        page = render({**payload, **live})
        numbers = json.dumps(to_plain(payload), ensure_ascii=False, allow_nan=False)
        self.files = {
            "/": ("text/html; charset=utf-8", page.encode()),
            "/report.json": ("application/json", numbers.encode()),
        }
        self.policy = policy(bool(live))
        self.trace_text, self.one_at_a_time = trace_text, threading.Lock()
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise OutputError(
                "cannot listen on this address", where=f"{host}:{port}", got=str(error), fix="try --port 0"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "moekit", ""
    timeout = TIMEOUT_S

    @property
    def report(self) -> ReportServer:
        return cast(ReportServer, self.server)

    def do_GET(self) -> None:
        """The page, and its numbers."""
        found = self.report.files.get(urlsplit(self.path).path)
        if not self._named_rightly():
            self._say(HTTPStatus.FORBIDDEN, {"error": "ask for this server by its address"})
        elif found is None:
            self._say(HTTPStatus.NOT_FOUND, {"error": "no such page"})
        else:
            self._send(HTTPStatus.OK, *found)

    def do_POST(self) -> None:
        """POST /trace {"text": ...}: the experts of each token."""
        length = self.headers.get("Content-Length", "")
        if not self._named_rightly() or self.headers.get("Origin") != f"http://{self.headers['Host']}":
            return self._say(HTTPStatus.FORBIDDEN, {"error": "only the page itself may ask"})
        if self.path != "/trace" or self.report.trace_text is None:
            return self._say(HTTPStatus.NOT_FOUND, {"error": "no such page"})
        if self.headers.get_content_type() != "application/json":
            return self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "send JSON"})
        if not length.isdecimal():
            return self._say(HTTPStatus.LENGTH_REQUIRED, {"error": "say how long the text is"})
        if int(length) > BODY_BYTES:
            return self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": "the text is too long"})
        try:
            text = json.loads(self.rfile.read(int(length)))["text"]
            if not isinstance(text, str) or len(text) > TEXT_CHARACTERS:
                raise ValueError(f"a text of at most {TEXT_CHARACTERS} characters is wanted")
        except (ValueError, KeyError, TypeError) as error:
            return self._say(HTTPStatus.BAD_REQUEST, {"error": str(error)[:200]})
        try:
            with self.report.one_at_a_time:
                answer = self.report.trace_text(text)
        except UserError as error:
            return self._say(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except Exception as error:  # moekit's own mistake: the page says so, the server goes on
            say = f"internal error {type(error).__name__}: {error}"
            return self._say(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": say[:500]})
        return self._say(HTTPStatus.OK, answer)

    def _named_rightly(self) -> bool:
        """Whether the Host header names this server by an address or by a name of this machine."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return False
        if host in ("localhost", socket.gethostname().lower(), self.report.host.lower()):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _say(self, status: HTTPStatus, answer: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(answer).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.report.policy + "; frame-ancestors 'none'")
        for name, value in (
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Nothing: the terminal belongs to the user."""
