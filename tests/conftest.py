"""The local servers, a service on a real port, and the means to put things in and look at them."""

from __future__ import annotations

import json
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.from_thread
import httpx2
import pyarrow as pa
import pytest
import uvicorn
from blockbuster import BlockBuster, blockbuster_ctx

from mlsys.bq import put_table
from mlsys.clients import Clients, open_clients
from mlsys.gcs import write_blob
from mlsys.local import DATASET, PROJECT, LocalServers, local_servers, make_places
from mlsys.names import TableRef
from mlsys.settings import Settings
from service.app import create_app


@pytest.fixture(scope="session", autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call on any event loop of this process raises where it is made."""
    with blockbuster_ctx() as detector:
        # Coverage waits for its own lock, where another thread adds to what it has counted.
        detector.functions["threading.Lock.acquire"].can_block_in(
            "coverage/collector.py", "lock_data"
        )
        # gRPC joins the thread that polls for it, as the last of its channels is closed.
        detector.functions["threading.Lock.acquire"].can_block_in(
            "threading.py", "_wait_for_tstate_lock"
        )
        yield detector


def pytest_configure() -> None:
    """Has Ctrl-C raise, as in a terminal: what runs in the background is started without that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def servers() -> Iterator[LocalServers]:
    with local_servers() as running:
        yield running


@pytest.fixture(scope="session")
def settings(servers: LocalServers) -> Settings:
    # A service in this process shares its memory with the tests and the local servers.
    return servers.settings(retry_seconds=10, progress_seconds=0.05, memory_limit_bytes=2**40)


@dataclass(frozen=True)
class Cloud:
    """The local servers as a test sees them: blocking calls, and names that are its own."""

    settings: Settings
    clients: Clients
    portal: anyio.from_thread.BlockingPortal

    def name(self, prefix: str = "t") -> str:
        return f"{prefix}_{uuid.uuid4().hex[:12]}"

    def new_table(self, prefix: str = "t") -> str:
        """The path of a table that does not exist yet."""
        return f"{PROJECT}.{DATASET}.{self.name(prefix)}"

    def put(self, data: pa.Table, path: str | None = None) -> str:
        """Stores rows in a table and returns its path."""
        path = path or self.new_table()
        ref = TableRef.parse(path)
        self.portal.call(put_table, self.clients, self.settings, data, ref)
        return path

    def rows(self, path: str, order_by: str | None = None) -> list[dict[str, Any]]:
        """Every row of a table, by Google's own client and a query."""
        order = f" ORDER BY {order_by}" if order_by else ""
        return [dict(row) for row in self.query(f"SELECT * FROM `{path}`{order}")]

    def count(self, path: str) -> int:
        return next(iter(self.query(f"SELECT COUNT(*) AS n FROM `{path}`")))["n"]

    def columns(self, path: str) -> dict[str, str]:
        """Names and types of a table's columns."""
        return {c.name: c.field_type for c in self.clients.bigquery.get_table(path).schema}

    def exists(self, path: str) -> bool:
        from google.api_core.exceptions import NotFound

        try:
            self.clients.bigquery.get_table(path)
        except NotFound:
            return False
        return True

    def query(self, sql: str) -> Any:
        return self.clients.bigquery.query(sql).result()

    def upload(self, path: str, data: bytes, env: str = "dev") -> None:
        """Stores an object in the model bucket of an environment."""
        bucket = getattr(self.settings, f"gcs_bucket_models_{env}")
        content_type = "application/octet-stream"
        self.portal.call(write_blob, self.clients.objects, bucket, path, data, content_type)

    def publish(
        self,
        model: Any,
        name: str | None = None,
        *,
        version: str = "v1",
        env: str = "dev",
        **metadata: Any,
    ) -> str:
        """Stores a model, and metadata.json where any is given; returns the model's name."""
        name = name or self.name("model").replace("_", "-")
        self.upload(f"{name}/{version}/model.pkl", pickle.dumps(model), env)
        if metadata:
            self.upload(f"{name}/{version}/metadata.json", json.dumps(metadata).encode(), env)
        return name


@contextmanager
def open_cloud(settings: Settings) -> Iterator[Cloud]:
    with ExitStack() as stack:
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        clients = stack.enter_context(portal.wrap_async_context_manager(open_clients(settings)))
        portal.call(make_places, clients, settings)
        yield Cloud(settings, clients, portal)


@pytest.fixture(scope="session")
def cloud(settings: Settings) -> Iterator[Cloud]:
    with open_cloud(settings) as opened:
        yield opened


class Client(httpx2.Client):
    """An HTTP client of the service, with the call that nearly every test makes."""

    def predict(
        self, input_table: str, output_table: str, model: str, **more: Any
    ) -> httpx2.Response:
        """`GET /predict` of the model's latest version in dev, unless `more` says otherwise."""
        parameters = {
            "env": "dev",
            "input_table": input_table,
            "output_table": output_table,
            "model_name": model,
            "model_version": "latest",
        }
        return self.get("/predict", params=parameters | more)


@contextmanager
def running_service(settings: Settings) -> Iterator[Client]:
    """The service on a free port of 127.0.0.1, in a thread of this process."""
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the service did not stop"


@pytest.fixture(scope="session")
def service(settings: Settings) -> Iterator[Client]:
    with running_service(settings) as client:
        yield client


@pytest.fixture
def start_service(settings: Settings) -> Iterator[Callable[..., Client]]:
    """Starts a service with other settings than the shared one's; stopped after the test."""
    with ExitStack() as stack:

        def start(**changes: Any) -> Client:
            own = settings.model_copy(update=changes)
            return stack.enter_context(running_service(own))

        yield start
