"""Streams of rows: once, in order, whatever breaks on the way, and no faster than they are used."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import anyio
import grpc
import pyarrow as pa
import pytest
import stamina.instrumentation
from anyio.abc import ObjectReceiveStream
from google.cloud.bigquery_storage_v1 import types

from mlsys.clients import Clients, StorageApi
from mlsys.errors import AccessDenied, InvalidRequest, NotFound, Unavailable
from mlsys.names import TableRef
from mlsys.read import ReadSession, open_session, read_stream
from mlsys.settings import Settings
from tests.mlsys.conftest import Put
from tests.mlsys.storage_server import (
    LOST,
    PATIENCE,
    RESET,
    Fault,
    Silence,
    StorageServer,
    batches_of,
    cutting_proxy,
    id_list,
    ids,
    storage_api,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_backoff")]

TABLE = TableRef.parse("my-project.mlsys_dev.clicks")
CODES = grpc.StatusCode


async def session_of(api: StorageApi, table: TableRef = TABLE, **options: object) -> ReadSession:
    return await open_session(api, table, project=table.project, **options)


async def read_all(
    api: StorageApi, session: ReadSession, stream: str, **options: object
) -> tuple[list[pa.RecordBatch], int]:
    """The batches that one stream sends, and the number of rows it says it has sent."""
    batches: list[pa.RecordBatch] = []
    count = 0
    sender, receiver = anyio.create_memory_object_stream[pa.RecordBatch](0)

    async def read() -> None:
        nonlocal count
        count = await read_stream(api, session, stream, sender, **options)

    with anyio.fail_after(PATIENCE):
        async with receiver, anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            batches.extend([batch async for batch in receiver])
    return batches, count


async def read_ids(server: StorageServer, api: StorageApi, **options: object) -> list[int]:
    """The ids of the first stream, as many as were counted."""
    session = await session_of(api)
    batches, count = await read_all(api, session, session.streams[0], **options)
    found = id_list(batches)
    assert count == len(found)
    return found


@asynccontextmanager
async def reading(
    api: StorageApi, session: ReadSession
) -> AsyncIterator[tuple[ObjectReceiveStream[pa.RecordBatch], Callable[[], None]]]:
    """A read in the background: what it sends, and how to cancel it."""
    sender, receiver = anyio.create_memory_object_stream[pa.RecordBatch](0)
    with anyio.fail_after(PATIENCE):
        async with receiver, anyio.create_task_group() as tasks:
            tasks.start_soon(read_stream, api, session, session.streams[0], sender)
            yield receiver, tasks.cancel_scope.cancel


async def other_traffic(api: StorageApi, calls: int = 100) -> None:
    """Gives whatever is under way on the server the time of so many calls."""
    for _ in range(calls):
        await session_of(api)


async def test_a_stream_is_sent_whole_and_in_order(server: StorageServer, api: StorageApi) -> None:
    server.sources["s"] = batches_of(1000, 64)

    assert await read_ids(server, api) == list(range(1000))
    [call] = server.of("ReadRows")
    assert call.request.offset == 0
    assert call.metadata["x-goog-request-params"] == "read_stream=s"


async def test_a_message_without_rows_is_passed_over(
    server: StorageServer, api: StorageApi
) -> None:
    without = pa.record_batch({})
    server.sources["s"] = [without, ids(0, 5), without, ids(5, 5), ids(5, 7), without]

    assert await read_ids(server, api) == list(range(7))
    assert len(server.of("ReadRows")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        LOST,
        RESET,
        Fault(CODES.INTERNAL, "Received GOAWAY"),
        Fault(CODES.UNKNOWN),
        Fault(CODES.ABORTED),
        Fault(CODES.DEADLINE_EXCEEDED),
    ],
    ids=lambda fault: f"{fault.code.name}-{fault.details}",
)
@pytest.mark.parametrize("row", [0, 10, 57, 100])
async def test_a_stream_that_breaks_is_opened_again_at_the_row_it_had_come_to(
    server: StorageServer, api: StorageApi, fault: Fault, row: int
) -> None:
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].append((row, fault))

    assert await read_ids(server, api) == list(range(100))
    assert [call.request.offset for call in server.of("ReadRows")] == [0, row]


@pytest.mark.parametrize("row", [0, 10, 57, 100])
async def test_a_stream_that_falls_silent_is_opened_again_at_the_row_it_had_come_to(
    server: StorageServer, api: StorageApi, row: int
) -> None:
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].append((row, Silence()))

    assert await read_ids(server, api, silence_seconds=0.2) == list(range(100))
    silent, again = server.of("ReadRows")
    assert [silent.request.offset, again.request.offset] == [0, row]
    assert silent.cancelled


async def test_a_stream_that_breaks_at_every_turn_still_arrives_once(
    server: StorageServer, api: StorageApi
) -> None:
    server.sources["s"] = batches_of(100, 7)
    stops = [0, 0, 3, 3, 3, 7, 8, 50, 51, 99, 100]
    server.replies["ReadRows"].extend((row, RESET) for row in stops)

    assert await read_ids(server, api) == list(range(100))
    assert [call.request.offset for call in server.of("ReadRows")] == [0, *stops]


@pytest.mark.parametrize(
    ("fault", "ours"),
    [
        (Fault(CODES.INTERNAL, "an internal error"), Unavailable),
        (Fault(CODES.PERMISSION_DENIED), AccessDenied),
        (Fault(CODES.RESOURCE_EXHAUSTED, "quota"), Unavailable),
        (Fault(CODES.NOT_FOUND), NotFound),
        (Fault(CODES.FAILED_PRECONDITION, "the session is over"), InvalidRequest),
    ],
    ids=lambda value: getattr(getattr(value, "code", value), "name", None),
)
@pytest.mark.parametrize("row", [0, 15])
async def test_a_failure_that_does_not_pass_is_told_at_once(
    server: StorageServer, api: StorageApi, fault: Fault, ours: type[Exception], row: int
) -> None:
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].append((row, fault))
    session = await session_of(api)
    sender, receiver = anyio.create_memory_object_stream[pa.RecordBatch](100)

    with receiver, anyio.fail_after(PATIENCE):
        with pytest.raises(ours, match="Reading my-project"):
            await read_stream(api, session, "s", sender)
        # What was read has been sent, and the end of it is the end of the stream.
        assert id_list([batch async for batch in receiver]) == list(range(row))
    assert len(server.of("ReadRows")) == 1


async def test_a_session_that_is_over_is_told_with_what_to_do(
    server: StorageServer, api: StorageApi
) -> None:
    server.sources["s"] = batches_of(100, 10)
    over = Fault(CODES.FAILED_PRECONDITION, "session expired at 12:00")
    server.replies["ReadRows"].append((50, over))

    with pytest.raises(ExceptionGroup) as raised:
        await read_ids(server, api)

    [error] = raised.value.exceptions
    assert isinstance(error, InvalidRequest)
    assert "session expired at 12:00" in str(error)
    assert "6 hours" in str(error)


@pytest.mark.parametrize("code", [CODES.INVALID_ARGUMENT, CODES.OUT_OF_RANGE], ids=str)
async def test_a_filter_that_fails_on_a_row_is_told_without_the_row(
    server: StorageServer, api: StorageApi, code: grpc.StatusCode
) -> None:
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].append((15, Fault(code, "Bad int64 value: hush")))
    session = await session_of(api)
    sender, receiver = anyio.create_memory_object_stream[pa.RecordBatch](100)

    with (
        receiver,
        anyio.fail_after(PATIENCE),
        pytest.raises(InvalidRequest, match="the filter fails on a row") as raised,
    ):
        await read_stream(api, session, "s", sender)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize("row", [0, 25])
async def test_a_server_that_says_when_to_come_back_is_asked_again(
    server: StorageServer, api: StorageApi, row: int
) -> None:
    server.sources["s"] = batches_of(100, 10)
    busy = Fault(CODES.RESOURCE_EXHAUSTED, "too many reads", retry_after=0.01)
    server.replies["ReadRows"].extend([(row, busy), (row, busy)])

    assert await read_ids(server, api) == list(range(100))
    assert [call.request.offset for call in server.of("ReadRows")] == [0, row, row]


@pytest.mark.parametrize("row", [0, 20])
async def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(
    server: StorageServer, api: StorageApi, row: int
) -> None:
    in_a_while = Fault(CODES.RESOURCE_EXHAUSTED, "too many reads", retry_after=50)
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].append((row, in_a_while))
    session = await session_of(api)
    with stamina.set_testing(False):
        async with reading(api, session) as (receiver, cancel):
            for _ in range(row // 10):
                await receiver.receive()
            await server.until(lambda: bool(server.of("ReadRows")))
            await server.of("ReadRows")[0].ended.wait()
            await other_traffic(api)
            cancel()

    assert len(server.of("ReadRows")) == 1


async def test_each_try_that_gets_nowhere_waits_before_the_next(
    server: StorageServer, api: StorageApi
) -> None:
    server.sources["s"] = batches_of(10, 10)
    server.replies["ReadRows"].extend([(0, LOST)] * 2)
    waits: list[float] = []
    stamina.instrumentation.set_on_retry_hooks([lambda details: waits.append(details.wait_for)])
    with stamina.set_testing(False):
        assert await read_ids(server, api) == list(range(10))

    assert len(waits) == 2
    assert min(waits) >= 0.1


async def test_a_stream_that_never_comes_back_is_given_up(
    server: StorageServer, api: StorageApi
) -> None:
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].extend([(30, LOST)] * 1000)
    session = await session_of(api)

    with stamina.set_testing(False), pytest.raises(ExceptionGroup) as raised:
        await read_all(api, session, "s", retry_seconds=0.01)

    [error] = raised.value.exceptions
    assert isinstance(error, Unavailable)
    assert len(server.of("ReadRows")) < 10


async def test_nothing_is_read_ahead_of_a_consumer_that_takes_nothing(
    server: StorageServer, api: StorageApi
) -> None:
    megabyte = ids(0, 131_072)
    server.sources["s"] = itertools.repeat(megabyte)
    session = await session_of(api)
    async with reading(api, session) as (receiver, cancel):
        await receiver.receive()
        await other_traffic(api)
        [call] = server.of("ReadRows")
        ahead = call.answers
        for _ in range(20):
            await receiver.receive()
        assert call.answers > ahead
        cancel()

    # The windows of HTTP/2 and the sockets in between hold a few messages of 1 MB, and no more.
    assert ahead <= 16


async def test_cancelling_a_read_ends_the_call_on_the_server(
    server: StorageServer, api: StorageApi
) -> None:
    server.sources["s"] = itertools.repeat(ids(0, 1000))
    session = await session_of(api)
    async with reading(api, session) as (receiver, cancel):
        await receiver.receive()
        cancel()
    [call] = server.of("ReadRows")
    with anyio.fail_after(PATIENCE):
        await call.ended.wait()

    assert call.cancelled


async def test_a_consumer_that_goes_away_ends_the_call_on_the_server(
    server: StorageServer, api: StorageApi
) -> None:
    server.sources["s"] = itertools.repeat(ids(0, 1000))
    session = await session_of(api)
    sender, receiver = anyio.create_memory_object_stream[pa.RecordBatch](0)
    receiver.close()

    with anyio.fail_after(PATIENCE):
        with pytest.raises(anyio.BrokenResourceError):
            await read_stream(api, session, "s", sender)
        [call] = server.of("ReadRows")
        await call.ended.wait()


@pytest.mark.parametrize("cut", [200, 3_000, 40_000, 300_000, 900_000])
async def test_a_connection_that_is_cut_costs_no_row_and_doubles_none(
    server: StorageServer, cut: int
) -> None:
    rows = 200_000
    server.sources["s"] = batches_of(rows, 5_000)
    async with (
        cutting_proxy(server.address, [cut, cut * 2]) as proxy,
        storage_api(proxy.address) as api,
    ):
        assert await read_ids(server, api) == list(range(rows))

    assert proxy.dropped >= 1


async def test_the_session_asks_for_what_was_asked_for(
    server: StorageServer, api: StorageApi
) -> None:
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    server.sources |= {"s/0": [], "s/1": []}
    session = await session_of(
        api,
        columns=["b", "a"],
        where="a > 1",
        max_streams=7,
        snapshot_time=at,
        compression="zstd",
    )

    [call] = server.of("CreateReadSession")
    asked = call.request
    assert asked.parent == "projects/my-project"
    assert asked.max_stream_count == asked.preferred_min_stream_count == 7
    assert asked.read_session.table == TABLE.resource
    assert list(asked.read_session.read_options.selected_fields) == ["b", "a"]
    assert asked.read_session.read_options.row_restriction == "a > 1"
    codec = asked.read_session.read_options.arrow_serialization_options.buffer_compression
    assert codec == types.ArrowSerializationOptions.CompressionCodec.ZSTD
    snapshot = asked.read_session.table_modifiers.snapshot_time
    assert snapshot.ToDatetime(tzinfo=UTC) == at
    assert call.metadata["x-goog-request-params"] == f"read_session.table={TABLE.resource}"
    assert session == ReadSession(TABLE, server.schema, ("s/0", "s/1"))


async def test_without_a_snapshot_time_the_table_is_read_as_it_is_now(
    server: StorageServer, api: StorageApi
) -> None:
    await session_of(api)

    [call] = server.of("CreateReadSession")
    assert not call.request.read_session.table_modifiers.HasField("snapshot_time")


async def test_opening_a_session_is_tried_again(server: StorageServer, api: StorageApi) -> None:
    server.replies["CreateReadSession"].extend([LOST, RESET])

    assert (await session_of(api)).schema == server.schema
    assert len(server.of("CreateReadSession")) == 3


async def test_a_refused_filter_is_told_in_the_servers_words(
    server: StorageServer, api: StorageApi
) -> None:
    refusal = Fault(CODES.INVALID_ARGUMENT, "Syntax error: unexpected 'DROP'")
    server.replies["CreateReadSession"].append(refusal)

    with pytest.raises(InvalidRequest, match="unexpected 'DROP'"):
        await session_of(api, where="DROP")


async def test_a_table_of_the_local_server_is_read_by_several_streams_each_row_once(
    clients: Clients, put: Put
) -> None:
    rows = 400_000
    table = await put(pa.table(batches_of(rows, rows)[0]))
    session = await session_of(clients.storage, table, max_streams=4)
    assert len(session.streams) > 1
    found: list[int] = []

    async def read(stream: str) -> None:
        batches, count = await read_all(clients.storage, session, stream)
        assert count == sum(batch.num_rows for batch in batches)
        found.extend(id_list(batches))

    async with anyio.create_task_group() as tasks:
        for stream in session.streams:
            tasks.start_soon(read, stream)

    assert sorted(found) == list(range(rows))


async def test_a_cut_connection_to_the_local_server_costs_no_row(
    settings: Settings, put: Put
) -> None:
    rows = 100_000
    table = await put(pa.table(batches_of(rows, rows)[0]))
    host = settings.bigquery_storage_emulator_host
    assert host is not None
    async with (
        cutting_proxy(host, [150_000, 400_000]) as proxy,
        storage_api(proxy.address) as api,
    ):
        session = await session_of(api, table)
        [stream] = session.streams
        batches, _ = await read_all(api, session, stream)

    assert sorted(id_list(batches)) == list(range(rows))
    assert proxy.dropped >= 1


async def test_only_the_columns_and_the_rows_that_were_asked_for_arrive(
    clients: Clients, put: Put
) -> None:
    data = pa.table({"id": [1, 2, 3, 4], "name": ["a", "b", None, "d"], "x": [0.5, 1.5, 2.5, 3.5]})
    table = await put(data)
    session = await session_of(
        clients.storage, table, columns=["x", "id"], where="x > 1 AND name IS NOT NULL"
    )

    assert sorted(session.schema.names) == ["id", "x"]
    read = [(await read_all(clients.storage, session, s))[0] for s in session.streams]
    rows = [row for batches in read for batch in batches for row in batch.to_pylist()]
    assert sorted(rows, key=lambda row: row["id"]) == [{"id": 2, "x": 1.5}, {"id": 4, "x": 3.5}]


async def test_a_table_without_rows_still_has_its_schema(clients: Clients, put: Put) -> None:
    table = await put(pa.table({"id": pa.array([], pa.int64())}))
    session = await session_of(clients.storage, table, max_streams=3)

    assert session.schema.names == ["id"]
    for stream in session.streams:
        batches, count = await read_all(clients.storage, session, stream)
        assert (id_list(batches), count) == ([], 0)


@pytest.mark.parametrize("path", ["{dataset}.nothing_here", "mlsys-local.no_dataset.t"])
async def test_a_missing_table_is_named(clients: Clients, path: str) -> None:
    table = TableRef.parse(path.format(dataset="mlsys-local.mlsys_dev"))

    with pytest.raises(NotFound, match=f"Reading {table} does not exist"):
        await session_of(clients.storage, table)


async def test_a_filter_on_a_missing_column_is_the_callers_mistake(
    clients: Clients, put: Put
) -> None:
    table = await put(pa.table({"id": [1]}))

    with pytest.raises(InvalidRequest, match="Check the names in `where`"):
        await session_of(clients.storage, table, where="nope > 1")
