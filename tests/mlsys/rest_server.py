"""A small HTTP server that answers as a test says."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """What arrived."""

    method: str
    path: str
    query: str
    body: bytes


type Answer = tuple[int, Any]


@dataclass
class RestServer:
    """Where the server is, what it answers, and what arrived there so far.

    `answer` gives status and body; a body of bytes is sent as it is, any other as JSON.
    """

    url: str
    answer: Callable[[Request], Answer] = lambda _: (404, b"")
    requests: list[Request] = field(default_factory=list)


@contextmanager
def rest_server() -> Iterator[RestServer]:
    """Serves on a free port of 127.0.0.1, from threads of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            url = urlsplit(self.path)
            request = Request(self.command, url.path, url.query, self.rfile.read(length))
            running.requests.append(request)
            status, body = running.answer(request)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        running = RestServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()
            thread.join()


REASONS = {400: "invalid", 403: "accessDenied", 404: "notFound", 503: "backendError"}


def google_error(
    status: int, message: str = "the server's own words", reason: str | None = None
) -> Answer:
    """An error as Google's REST APIs word it."""
    details = {"message": message, "reason": reason or REASONS.get(status, "other")}
    return status, {"error": {"code": status, "message": message, "errors": [details]}}
