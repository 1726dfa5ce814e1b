"""What the tests of the library share: the asyncio backend, and a server that fails on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc.aio
import pyarrow as pa
import pytest
import stamina
import stamina.instrumentation
from blockbuster import BlockBuster

from mlsys.bq import put_table
from mlsys.clients import Clients, StorageApi, open_clients
from mlsys.names import TableRef
from mlsys.settings import Settings
from tests.conftest import Cloud
from tests.mlsys.rest_server import RestServer, rest_server
from tests.mlsys.storage_server import StorageServer, storage_api, storage_server


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    """Keeps the loop of the tests open, and unmoved by what is left of calls on closed loops.

    grpcio has one queue for all loops of a process: whichever is awake passes on what belongs to
    another, and fails if that one was closed meanwhile.
    """
    loop = asyncio.get_running_loop()
    fail = loop.get_exception_handler()
    assert fail is not None

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if str(context.get("exception")) != "Event loop is closed":
            fail(loop, context)

    loop.set_exception_handler(handle)
    yield
    loop.set_exception_handler(fail)


@pytest.fixture(scope="session", autouse=True)
async def grpc_stays_open(one_loop: None, no_blocking_calls: BlockBuster) -> AsyncIterator[None]:
    """Or closing the last channel of the process would wait, on its loop, for grpcio's thread."""
    # As this does, at the end of all tests.
    no_blocking_calls.functions["threading.Lock.acquire"].can_block_in(
        "tests/mlsys/conftest.py", "grpc_stays_open"
    )
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()


@pytest.fixture(autouse=True)
def unlogged_retries() -> Iterator[None]:
    """Retries are not logged: finding out where to would block the loop of the first of them."""
    before = stamina.instrumentation.get_on_retry_hooks()
    stamina.instrumentation.set_on_retry_hooks([])
    yield
    stamina.instrumentation.set_on_retry_hooks(before)


@pytest.fixture
def no_backoff() -> Iterator[None]:
    """Calls that may be tried again are, up to ten times, without a wait."""
    with stamina.set_testing(True, attempts=10):
        yield


@pytest.fixture
def rest() -> Iterator[RestServer]:
    with rest_server() as running:
        yield running


@pytest.fixture
async def server() -> AsyncIterator[StorageServer]:
    async with storage_server() as running:
        yield running


@pytest.fixture
async def api(server: StorageServer) -> AsyncIterator[StorageApi]:
    async with storage_api(server.address) as opened:
        yield opened


@pytest.fixture
async def clients(settings: Settings) -> AsyncIterator[Clients]:
    """Clients of the local servers, on the loop of the test."""
    async with open_clients(settings) as opened:
        yield opened


type Put = Callable[[pa.Table], Awaitable[TableRef]]


@pytest.fixture
def put(clients: Clients, settings: Settings, cloud: Cloud) -> Put:
    """Stores rows in a new table of the local server."""

    async def put(data: pa.Table) -> TableRef:
        table = TableRef.parse(cloud.new_table())
        await put_table(clients, settings, data, table)
        return table

    return put
