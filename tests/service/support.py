"""What the tests of the service share: proxies, processes, log lines and problems."""

from __future__ import annotations

import http.client
import http.server
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlencode, urlsplit

import grpc
import httpx2
import numpy as np
import pyarrow as pa

from mlsys.local import free_ports
from tests.conftest import Client, Cloud

ROOT = Path(__file__).parents[2]
PATIENCE = 30

# What must never be in an answer: where the service is installed, and what its tables hold.
SECRETS = (str(ROOT), sys.prefix, "site-packages", "/srv/models", "Traceback", "hush", "Bearer")


def numbers(rows: int, **columns: list[Any]) -> pa.Table:
    """A table of `id` and `x`, both 0, 1, 2, …, and of the given columns."""
    ids = np.arange(rows)
    return pa.table({"id": ids, "x": ids.astype(float)} | columns)


def request_for(input_table: str, output_table: str, model: str, **more: Any) -> dict[str, Any]:
    """The parameters of a prediction by the latest version of a model in dev."""
    return {
        "env": "dev",
        "input_table": input_table,
        "output_table": output_table,
        "model_name": model,
        "model_version": "latest",
    } | more


def assert_problem(response: httpx2.Response, status: int, *told: str) -> dict[str, Any]:
    """Checks that a response is a problem with that status, and that its detail tells these."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return assert_problem_body(response.json(), status, *told)


def assert_problem_body(body: dict[str, Any], status: int, *told: str) -> dict[str, Any]:
    assert body["status"] == status, body
    assert body["type"].startswith("urn:mlsys:") or body["type"] == "about:blank"
    assert body["title"]
    assert body["detail"].isprintable()
    assert len(body["detail"]) < 1000
    for words in told:
        assert words in body["detail"]
    for secret in SECRETS:
        assert secret not in json.dumps(body)
    return body


def assert_nothing_appended(cloud: Cloud, table: str) -> None:
    assert not cloud.exists(table) or cloud.count(table) == 0


class Background:
    """A call in a thread, whose result is asked for later."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(call)
        self._pool.shutdown(wait=False)

    def result(self) -> Any:
        return self._future.result(PATIENCE)


@contextmanager
def abandoned(
    service: Client, parameters: Mapping[str, Any], accept: str = "*/*"
) -> Iterator[None]:
    """Asks for a prediction and hangs up at the end of the block, without reading the answer."""
    url = urlsplit(str(service.base_url))
    request = (
        f"GET /predict?{urlencode(parameters)} HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"Accept: {accept}\r\n\r\n"
    )
    with closing(socket.create_connection((url.hostname, url.port))) as connection:
        connection.sendall(request.encode())
        yield


class LogLines(logging.Handler):
    """The events that this process logs from now on."""

    def __init__(self) -> None:
        super().__init__()
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        told = record.msg if isinstance(record.msg, dict) else {"event": record.getMessage()}
        self._events.put(dict(told))

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first event of that name and with these fields among those not seen yet."""
        while True:
            told = self._events.get(timeout=PATIENCE)
            self.seen.append(told["event"])
            if told.get("event") == event and fields.items() <= told.items():
                return told


@contextmanager
def log_lines() -> Iterator[LogLines]:
    """Listens to the log. A service that starts sets up logging anew: listen after it has."""
    lines = LogLines()
    logging.getLogger().addHandler(lines)
    try:
        yield lines
    finally:
        logging.getLogger().removeHandler(lines)


class ObjectsProxy:
    """A server in front of Cloud Storage: counts the downloads, and damages them where told to."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.downloads: list[str] = []
        self.damage: Callable[[bytes], bytes] = bytes
        # Given the body of each request before it goes on; it may take its time.
        self.hold: Callable[[bytes], object] = bytes
        self.url = ""

    def downloads_of(self, model: str) -> int:
        """How often the file of a model was downloaded."""
        return sum(f"/{model}/" in path and "model.pkl" in path for path in self.downloads)

    def wait_for(self, file: str, times: int) -> None:
        """Waits until it was asked about files of that name so many times."""
        while times:
            times -= file in unquote(self._asked.get(timeout=PATIENCE))

    def forward(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """Passes one request on, and its answer back."""
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        self.hold(sent)
        with closing(http.client.HTTPConnection(self._target.netloc)) as connection:
            connection.request(handler.command, handler.path, sent, dict(handler.headers))
            answer = connection.getresponse()
            body = answer.read()
        self._asked.put(handler.path)
        if "alt=media" in handler.path:
            self.downloads.append(unquote(handler.path))
            body = self.damage(body)
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


@contextmanager
def objects_proxy(target: str) -> Iterator[ObjectsProxy]:
    proxy = ObjectsProxy(target)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            proxy.forward(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


class RowsProxy(grpc.GenericRpcHandler):
    """A server in front of the BigQuery Storage APIs: may hold calls back and change answers.

    `before` and `after` are by method: called before a call is passed on, and with the bytes of
    each answer. Either may raise `RefusedCall`. `asked` is every message that was passed on.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, _NO_LIMITS)
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[bytes], bytes]] = {}
        self.asked: list[tuple[str, bytes]] = []
        self.address = ""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        # On the wire a call with one message is a stream of one.
        return grpc.stream_stream_rpc_method_handler(partial(self._forward, details.method))

    def _forward(
        self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        name = method.rpartition("/")[2]
        try:
            self.before.get(name, lambda: None)()
            call = self._channel.stream_stream(method)(self._noted(name, requests))
            context.add_callback(call.cancel)
            for answer in call:
                yield self.after.get(name, bytes)(answer)
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())

    def _noted(self, name: str, requests: Iterator[bytes]) -> Iterator[bytes]:
        for request in requests:
            self.asked.append((name, request))
            yield request

    def messages(self, method: str) -> list[bytes]:
        """What a method was asked, in order."""
        return [message for name, message in self.asked if name == method]

    def close(self) -> None:
        self._channel.close()


_NO_LIMITS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class RefusedCall(grpc.RpcError):
    """What a server says no with."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._said = (code, details)

    def code(self) -> grpc.StatusCode:
        return self._said[0]

    def details(self) -> str:
        return self._said[1]


@contextmanager
def rows_proxy(target: str) -> Iterator[RowsProxy]:
    proxy = RowsProxy(target)
    with ThreadPoolExecutor(16) as threads, closing(proxy):
        server = grpc.server(threads, [proxy], options=_NO_LIMITS)
        proxy.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield proxy
        finally:
            server.stop(grace=None).wait()


@contextmanager
def hanging_up(url: httpx2.URL, *, before: bytes) -> Iterator[str]:
    """A relay to a service that hangs up on the caller when the service says those bytes."""

    def answer(connection: socket.socket) -> None:
        with connection, socket.create_connection((url.host, url.port)) as service:
            service.sendall(connection.recv(65_536))  # The request, which is a small one.
            said = b""
            while data := service.recv(65_536):
                said += data
                if before in said:
                    return
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        answered = threads.submit(lambda: answer(server.accept()[0]))
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        answered.result(PATIENCE)


@contextmanager
def server_that_says(status: int, content_type: str, body: bytes, **headers: str) -> Iterator[str]:
    """An HTTP server that gives one answer to everything, and then hangs up."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class ServiceProcess:
    """The service as its operator runs it, and what it writes to stderr."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes], url: str) -> None:
        self.process = process
        self.url = url
        self.lines: list[str] = []
        self._unseen: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(stderr,))
        self._reader.start()

    def _read(self, stderr: IO[bytes]) -> None:
        try:
            for line in stderr:
                self._unseen.put(line.decode().rstrip())
        except OSError:
            pass  # A terminal whose other end is closed says so.
        self._unseen.put(None)

    def wait_for_line(self, text: str) -> str:
        """The first line with that text among those not seen yet."""
        while (line := self._unseen.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"it ended without {text!r}:\n" + "\n".join(self.lines))

    def ends(self, within: float) -> int:
        """Its exit status, which it has to have after so many seconds."""
        status = self.process.wait(within)
        while (line := self._unseen.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return status

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has logged, up to what was waited for."""
        return [json.loads(line) for line in self.lines]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._reader.join()


def process_environment(**settings: str) -> dict[str, str]:
    """An environment with nothing in it but PATH, these settings and the test models' place."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | settings


@contextmanager
def service_process(
    env: Mapping[str, str], terminal: tuple[int, int] | None = None
) -> Iterator[ServiceProcess]:
    """Starts the service by the documented command; waits until it listens.

    Args:
        terminal: the two ends of a pseudo-terminal to be its stderr.
    """
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.app:create_app"]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=dict(env),
        # A place without an .env.
        cwd="/",
        stderr=terminal[1] if terminal else subprocess.PIPE,
        start_new_session=True,
    )
    if terminal:
        os.close(terminal[1])
    with process, open(terminal[0], "rb") if terminal else process.stderr as stderr:
        service = ServiceProcess(process, stderr, f"http://127.0.0.1:{port}")
        try:
            service.wait_for_line("Uvicorn running on")
            yield service
        finally:
            service.stop()
