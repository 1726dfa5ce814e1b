"""Rows into a table: whatever is lost on the way, each is stored once, or none is."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import grpc
import pyarrow as pa
import pytest
import stamina
from anyio.abc import ObjectSendStream
from google.cloud.bigquery_storage_v1 import types
from google.rpc import code_pb2

from mlsys.append import (
    AppendLimits,
    append_stream,
    commit_streams,
    create_stream,
    finalize_stream,
    split,
)
from mlsys.clients import Clients, StorageApi
from mlsys.errors import (
    AccessDenied,
    Conflict,
    IntegrityError,
    InvalidRequest,
    MlsysError,
    NotFound,
    TableMismatch,
    Unavailable,
)
from mlsys.names import TableRef
from mlsys.settings import LARGEST_APPEND, Settings
from mlsys.tasks import task_group
from tests.conftest import Cloud
from tests.mlsys.conftest import Put
from tests.mlsys.storage_server import (
    LOST,
    LOST_APPLIED,
    PATIENCE,
    RESET,
    Close,
    Fault,
    Silence,
    StorageServer,
    answer,
    batches_of,
    cutting_proxy,
    id_list,
    ids,
    storage_api,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_backoff")]

TABLE = TableRef.parse("my-project.mlsys_dev.scored")
CODES = grpc.StatusCode
ERRORS = types.StorageError.StorageErrorCode
SCHEMA = pa.schema([("id", pa.int64())])
LIMITS = AppendLimits(request_bytes=100_000, unacked_bytes=400_000, retry_seconds=10)
LOST_BEFORE = [LOST, RESET, Fault(CODES.UNKNOWN), Fault(CODES.ABORTED)]
LOST_AFTER = [LOST_APPLIED, Fault(CODES.INTERNAL, "RST_STREAM", applied=True)]


@dataclass
class Append:
    """An append in the background."""

    stream: str
    source: ObjectSendStream[pa.RecordBatch]
    cancel: Any
    acked: list[int] = field(default_factory=list)
    rows: int | None = None


@asynccontextmanager
async def appending(
    api: StorageApi,
    stream: str,
    *,
    schema: pa.Schema = SCHEMA,
    limits: AppendLimits = LIMITS,
) -> AsyncIterator[Append]:
    """Appends what is sent to `source` until the block ends."""
    source, batches = anyio.create_memory_object_stream[pa.RecordBatch](0)

    async def append() -> None:
        running.rows = await append_stream(
            api, stream, schema, batches.clone(), limits=limits, acked=running.acked.append
        )

    with anyio.fail_after(PATIENCE):
        async with batches, source, task_group() as tasks:
            running = Append(stream, source, tasks.cancel_scope.cancel)
            tasks.start_soon(append)
            yield running
            await source.aclose()


async def append_all(
    api: StorageApi, batches: Iterable[pa.RecordBatch], table: TableRef = TABLE, **options: Any
) -> Append:
    """Appends batches to a new stream."""
    stream = await create_stream(api, table)
    async with appending(api, stream, **options) as running:
        for batch in batches:
            await running.source.send(batch)
    return running


def assert_stored_once(server: StorageServer, append: Append, rows: int) -> None:
    """Checks that the server holds the ids 0, 1, … in order, and that all were counted."""
    assert id_list(server.sinks[append.stream].batches) == list(range(rows))
    assert append.rows == sum(append.acked) == rows


async def other_traffic(api: StorageApi, calls: int = 100) -> None:
    """Gives whatever is under way on the server the time of so many calls."""
    for _ in range(calls):
        await create_stream(api, TABLE)


# What is sent


async def test_each_append_names_its_offset_and_its_stream(
    server: StorageServer, api: StorageApi
) -> None:
    append = await append_all(api, [ids(0, 3), ids(3, 10), ids(10, 11)])

    assert_stored_once(server, append, 11)
    [call] = server.of("AppendRows")
    assert call.offsets == [0, 3, 10]
    assert {request.write_stream for request in call.requests} == {append.stream}
    assert call.metadata["x-goog-request-params"] == f"write_stream={append.stream}"
    assert append.acked == [3, 7, 1]


async def test_the_schema_is_sent_once_a_connection(server: StorageServer, api: StorageApi) -> None:
    server.steps[20] = LOST
    append = await append_all(api, batches_of(50, 10))

    assert_stored_once(server, append, 50)
    for call in server.of("AppendRows"):
        schemas = [r.arrow_rows.writer_schema.serialized_schema for r in call.requests]
        assert pa.ipc.read_schema(pa.py_buffer(schemas[0])) == SCHEMA
        assert not any(schemas[1:])


async def test_a_source_without_rows_opens_no_call(server: StorageServer, api: StorageApi) -> None:
    append = await append_all(api, [])

    assert append.rows == 0
    assert server.of("AppendRows") == []


async def test_batches_without_rows_are_not_sent(server: StorageServer, api: StorageApi) -> None:
    nothing = ids(0, 0)
    append = await append_all(api, [nothing, ids(0, 2), nothing, nothing, ids(2, 3), nothing])

    assert_stored_once(server, append, 3)
    assert [call.offsets for call in server.of("AppendRows")] == [[0, 2]]


async def test_only_batches_without_rows_open_no_call(
    server: StorageServer, api: StorageApi
) -> None:
    append = await append_all(api, [ids(0, 0)])

    assert append.rows == 0
    assert server.of("AppendRows") == []


def narrow() -> pa.RecordBatch:
    return ids(0, 50_000)


def wide() -> pa.RecordBatch:
    return pa.record_batch(
        {"id": pa.array(range(300), pa.int64())}
        | {f"column_{n}": pa.array([f"{n}-{row}" for row in range(300)]) for n in range(60)}
    )


def skewed() -> pa.RecordBatch:
    text = ["x" * (90_000 if row == 777 else row % 5) for row in range(2_000)]
    return pa.record_batch({"id": pa.array(range(2_000), pa.int64()), "text": pa.array(text)})


def lists() -> pa.RecordBatch:
    values = [list(range(row % 200)) for row in range(1_000)]
    columns = {"id": range(1_000), "values": pa.array(values, pa.list_(pa.int64()))}
    return pa.record_batch({name: pa.array(values) for name, values in columns.items()})


@pytest.mark.parametrize("make", [narrow, wide, skewed, lists])
async def test_no_request_is_larger_than_it_may_be(
    server: StorageServer, api: StorageApi, make: Any
) -> None:
    batch = make()
    append = await append_all(api, [batch], schema=batch.schema)

    [call] = server.of("AppendRows")
    sizes = [len(r.arrow_rows.rows.serialized_record_batch) for r in call.requests]
    assert max(sizes) <= LIMITS.request_bytes
    # The serialized rows are what a request weighs: the rest is its head.
    assert all(r.ByteSize() - size < 10_000 for r, size in zip(call.requests, sizes, strict=True))
    assert_stored_once(server, append, batch.num_rows)
    stored = pa.Table.from_batches(server.sinks[append.stream].batches).combine_chunks()
    assert stored.equals(pa.table(batch))


@pytest.mark.parametrize("make", [narrow, wide, skewed, lists])
@pytest.mark.parametrize("limit", [100_000, 300_000, LARGEST_APPEND])
def test_a_batch_is_cut_into_few_slices_that_are_its_rows(make: Any, limit: int) -> None:
    batch = make()
    parts = list(split(batch, limit))

    assert pa.Table.from_batches(parts).equals(pa.table(batch))
    assert all(part.num_rows for part in parts)
    assert all(part.serialize().size <= limit for part in parts)
    size = pa.ipc.get_record_batch_size(batch)
    assert len(parts) <= 1 if size <= limit else 4 * (size // limit + 1)


async def test_a_row_that_is_larger_than_requests_are_made_goes_alone(
    server: StorageServer, api: StorageApi
) -> None:
    large = "x" * (LIMITS.unacked_bytes + 1)
    batch = pa.record_batch({"id": [0, 1, 2, 3], "text": ["a", large, "b", "c"]})
    append = await append_all(api, [batch], schema=batch.schema)

    assert_stored_once(server, append, 4)
    assert server.sinks[append.stream].batches[1].equals(batch.slice(1, 1))


async def test_a_row_that_fits_no_request_is_the_callers_mistake(
    server: StorageServer, api: StorageApi
) -> None:
    batch = pa.record_batch({"id": [1, 2, 3], "text": ["a", "x" * (LARGEST_APPEND + 1), "b"]})

    with pytest.raises(InvalidRequest, match=r"A row of 9,437,\d+ bytes .* \(9,437,184 bytes\)"):
        await append_all(api, [batch], schema=batch.schema)
    for call in server.of("AppendRows"):
        await call.ended.wait()


async def test_no_more_than_the_bound_is_under_way_while_no_answer_comes(
    server: StorageServer, api: StorageApi
) -> None:
    server.acks = anyio.Event()
    batches = batches_of(300_000, 10_000)
    stream = await create_stream(api, TABLE)

    def received() -> int:
        requests = itertools.chain.from_iterable(c.requests for c in server.of("AppendRows"))
        return sum(len(r.arrow_rows.rows.serialized_record_batch) for r in requests)

    async with appending(api, stream) as append, anyio.create_task_group() as tasks:

        async def feed() -> None:
            for batch in batches:
                await append.source.send(batch)

        tasks.start_soon(feed)
        # What is under way grows to the bound, and stays there as long as there are no answers.
        await server.until(lambda: received() > LIMITS.unacked_bytes - LIMITS.request_bytes)
        await other_traffic(api)
        assert received() <= LIMITS.unacked_bytes
        assert append.acked == []
        server.acks.set()

    assert_stored_once(server, append, 300_000)
    assert len(server.of("AppendRows")) == 1


async def test_a_request_larger_than_the_bound_goes_alone(
    server: StorageServer, api: StorageApi
) -> None:
    limits = AppendLimits(request_bytes=100_000, unacked_bytes=1)
    server.acks = anyio.Event()
    stream = await create_stream(api, TABLE)
    async with appending(api, stream, limits=limits) as append:
        await append.source.send(ids(0, 5))
        await append.source.send(ids(5, 10))
        await server.until(lambda: any(call.requests for call in server.of("AppendRows")))
        await other_traffic(api)
        assert server.of("AppendRows")[0].offsets == [0]
        server.acks.set()

    assert_stored_once(server, append, 10)


# What is lost


@pytest.mark.parametrize("fault", [*LOST_BEFORE, *LOST_AFTER], ids=str)
@pytest.mark.parametrize("offset", [0, 50, 90])
async def test_a_lost_connection_is_made_again_and_what_was_not_acknowledged_sent_again(
    server: StorageServer, api: StorageApi, fault: Fault, offset: int
) -> None:
    server.steps[offset] = fault
    append = await append_all(api, batches_of(100, 10))

    assert_stored_once(server, append, 100)
    first, second = server.of("AppendRows")
    assert first.offsets == list(range(0, offset + 10, 10))
    assert second.offsets == list(range(offset, 100, 10))


@pytest.mark.parametrize("applied", [False, True], ids=["before", "applied"])
@pytest.mark.parametrize("offset", [0, 50, 90])
async def test_a_server_that_falls_silent_is_called_again(
    server: StorageServer, api: StorageApi, offset: int, applied: bool
) -> None:
    server.steps[offset] = Silence(applied)
    append = await append_all(api, batches_of(100, 10), limits=replace(LIMITS, silence_seconds=0.2))

    assert_stored_once(server, append, 100)
    silent, again = server.of("AppendRows")
    assert again.offsets == list(range(offset, 100, 10))
    assert silent.cancelled


async def test_a_server_that_answers_all_and_does_not_end_the_call_is_not_waited_for(
    server: StorageServer, api: StorageApi
) -> None:
    server.steps[90] = Silence(answered=True)

    with anyio.fail_after(30):
        append = await append_all(
            api, batches_of(100, 10), limits=replace(LIMITS, silence_seconds=0.2)
        )

    assert_stored_once(server, append, 100)


async def test_answers_that_were_lost_are_asked_for_again(
    server: StorageServer, api: StorageApi
) -> None:
    server.acks = anyio.Event()
    stream = await create_stream(api, TABLE)
    async with appending(api, stream) as append:
        for batch in batches_of(50, 10):
            await append.source.send(batch)
        await server.until(lambda: server.sinks[stream].rows == 50)
        # All five are applied and none is answered when the connection goes.
        server.steps[50] = LOST
        await append.source.send(ids(50, 60))
        await server.until(lambda: len(server.of("AppendRows")) > 1)
        server.acks.set()

    assert_stored_once(server, append, 60)
    assert [call.offsets for call in server.of("AppendRows")] == [[0, 10, 20, 30, 40, 50]] * 2


async def test_a_connection_that_is_lost_again_and_again_still_loses_no_row(
    server: StorageServer, api: StorageApi
) -> None:
    closes = [Close(), Close(applied=True), Close(answered=True)]
    steps = [*LOST_BEFORE, *LOST_AFTER, *closes]
    server.steps |= {10 * n: step for n, step in zip(range(40), itertools.cycle(steps))}
    append = await append_all(api, batches_of(400, 10))

    assert_stored_once(server, append, 400)
    assert len(server.of("AppendRows")) > 20


@pytest.mark.parametrize(
    "step", [Close(), Close(applied=True), Close(answered=True)], ids=["before", "applied", "after"]
)
@pytest.mark.parametrize("offset", [0, 50, 80])
async def test_a_server_that_hangs_up_politely_is_called_again(
    server: StorageServer, api: StorageApi, step: Close, offset: int
) -> None:
    server.steps[offset] = step
    append = await append_all(api, batches_of(100, 10))

    assert_stored_once(server, append, 100)
    assert len(server.of("AppendRows")) == 2


async def test_a_server_that_hangs_up_after_the_last_answer_is_not_called_again(
    server: StorageServer, api: StorageApi
) -> None:
    server.steps[90] = Close(answered=True)
    append = await append_all(api, batches_of(100, 10))

    assert_stored_once(server, append, 100)
    assert len(server.of("AppendRows")) == 1


async def test_a_server_that_hangs_up_while_the_source_is_quiet_is_called_when_there_are_rows(
    server: StorageServer, api: StorageApi
) -> None:
    server.steps[10] = Close(answered=True)
    stream = await create_stream(api, TABLE)
    async with appending(api, stream) as append:
        await append.source.send(ids(0, 10))
        await append.source.send(ids(10, 20))
        await server.until(lambda: server.sinks[stream].rows == 20)
        await server.of("AppendRows")[0].ended.wait()
        await other_traffic(api)
        assert len(server.of("AppendRows")) == 1
        await append.source.send(ids(20, 30))

    assert_stored_once(server, append, 30)
    assert [call.offsets for call in server.of("AppendRows")] == [[0, 10], [20]]


async def test_a_connection_lost_after_the_last_answer_is_no_failure(
    server: StorageServer, api: StorageApi
) -> None:
    stream = await create_stream(api, TABLE)
    async with appending(api, stream) as append:
        await append.source.send(ids(0, 10))
        await server.until(lambda: server.sinks[stream].rows == 10)
        server.steps[10] = LOST
        await append.source.send(ids(10, 20))

    assert_stored_once(server, append, 20)


@pytest.mark.parametrize("step", [LOST, answer(code_pb2.UNAVAILABLE)], ids=["call", "answer"])
async def test_a_source_that_is_slower_than_the_retries_may_last_costs_nothing(
    server: StorageServer, api: StorageApi, step: Any
) -> None:
    limits = AppendLimits(100_000, 400_000, retry_seconds=0.05)
    server.steps[0] = step
    stream = await create_stream(api, TABLE)
    with stamina.set_testing(False):
        async with appending(api, stream, limits=limits) as append:
            began = anyio.current_time()
            while anyio.current_time() - began < 0.1:
                await other_traffic(api, calls=1)
            await append.source.send(ids(0, 10))

    assert_stored_once(server, append, 10)


async def test_a_server_that_never_comes_back_is_given_up(
    server: StorageServer, api: StorageApi
) -> None:
    server.steps[0] = Fault(CODES.UNAVAILABLE, lasting=True)
    limits = AppendLimits(100_000, 400_000, retry_seconds=0.01)
    with stamina.set_testing(False), pytest.raises(Unavailable):
        await append_all(api, [ids(0, 10)], limits=limits)

    assert len(server.of("AppendRows")) < 10


@pytest.mark.parametrize("towards_server", [True, False], ids=["requests", "answers"])
@pytest.mark.parametrize("cut", [400, 5_000, 70_000, 400_000, 1_300_000])
async def test_a_connection_that_is_cut_loses_no_row_and_doubles_none(
    server: StorageServer, cut: int, towards_server: bool
) -> None:
    cut = cut if towards_server else 350 + cut // 5_000
    rows = 200_000
    async with (
        cutting_proxy(server.address, [cut] * 3, towards_server=towards_server) as proxy,
        storage_api(proxy.address) as api,
    ):
        append = await append_all(api, batches_of(rows, 10_000))

    assert_stored_once(server, append, rows)
    assert proxy.dropped >= 1


# What is refused


@pytest.mark.parametrize("code", ["UNAVAILABLE", "ABORTED", "INTERNAL", "UNKNOWN", "CANCELLED"])
async def test_an_answer_that_says_the_failure_passes_is_sent_again(
    server: StorageServer, api: StorageApi, code: str
) -> None:
    server.steps[20] = answer(code_pb2.Code.Value(code))
    append = await append_all(api, batches_of(50, 10))

    assert_stored_once(server, append, 50)
    assert server.of("AppendRows")[1].offsets == [20, 30, 40]


def refused_rows() -> Any:
    error = types.RowError.pb()(index=3, code=types.RowError.RowErrorCode.FIELDS_ERROR)
    return types.AppendRowsResponse.pb()(
        row_errors=[error], error={"code": code_pb2.INVALID_ARGUMENT, "message": "row 3: hush"}
    )


def misplaced() -> Any:
    response = types.AppendRowsResponse.pb()()
    response.append_result.offset.value = 7
    return response


@pytest.mark.parametrize(
    ("step", "ours", "told"),
    [
        (answer(code_pb2.PERMISSION_DENIED), AccessDenied, "may not write"),
        (answer(code_pb2.UNAUTHENTICATED), AccessDenied, "may not write"),
        (answer(code_pb2.OUT_OF_RANGE), IntegrityError, "lost an append"),
        (answer(code_pb2.RESOURCE_EXHAUSTED), Unavailable, "quota"),
        (answer(code_pb2.INVALID_ARGUMENT, "no field x"), TableMismatch, "no field x"),
        (refused_rows(), TableMismatch, "refused 1 of the rows"),
        (misplaced(), IntegrityError, "another place"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("offset", [0, 20])
async def test_a_refusal_is_told_at_once_and_ends_the_call(
    server: StorageServer,
    api: StorageApi,
    step: Any,
    ours: type[MlsysError],
    told: str,
    offset: int,
) -> None:
    server.steps[offset] = step

    with pytest.raises(ours, match=told) as raised:
        await append_all(api, batches_of(50, 10))

    assert "hush" not in str(raised.value)
    calls = server.of("AppendRows")
    with anyio.fail_after(PATIENCE):
        for call in calls:
            await call.ended.wait()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("code", "ours", "told"),
    [
        (CODES.PERMISSION_DENIED, AccessDenied, "credentials"),
        (CODES.OUT_OF_RANGE, IntegrityError, "lost an append"),
        (CODES.INVALID_ARGUMENT, InvalidRequest, "told to fail"),
        (CODES.RESOURCE_EXHAUSTED, Unavailable, "try again"),
        (CODES.INTERNAL, Unavailable, "try again"),
        (CODES.ALREADY_EXISTS, Conflict, "exists already"),
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 20])
async def test_a_call_that_is_refused_is_told_as_what_it_is(
    server: StorageServer,
    api: StorageApi,
    code: grpc.StatusCode,
    ours: type[MlsysError],
    told: str,
    offset: int,
) -> None:
    server.steps[offset] = Fault(code, lasting=True)

    with pytest.raises(ours, match=told):
        await append_all(api, batches_of(50, 10))
    assert len(server.of("AppendRows")) == 1


async def test_an_answer_to_nothing_is_not_taken_for_an_acknowledgement(
    server: StorageServer, api: StorageApi
) -> None:
    stream = await create_stream(api, TABLE)
    twice = types.AppendRowsResponse.pb()()
    server.unasked.append(twice)

    with pytest.raises(IntegrityError, match="not sent"):
        async with appending(api, stream) as append:
            await append.source.send(ids(0, 10))


async def test_a_refusal_while_there_is_more_to_write_is_told_as_what_it_is(
    server: StorageServer, api: StorageApi
) -> None:
    """grpcio may put an error of its own in the place of the server's."""
    limits = AppendLimits(LARGEST_APPEND, 4 * LARGEST_APPEND, retry_seconds=10)
    server.steps[0] = Fault(CODES.PERMISSION_DENIED, lasting=True)
    for calls in range(1, 6):
        with pytest.raises(AccessDenied):
            await append_all(api, batches_of(600_000, 200_000), limits=limits)
        assert len(server.of("AppendRows")) == calls


# What is cancelled


async def test_cancelling_an_append_ends_the_call_on_the_server(
    server: StorageServer, api: StorageApi
) -> None:
    stream = await create_stream(api, TABLE)
    async with appending(api, stream) as append:
        await append.source.send(ids(0, 10))
        await server.until(lambda: server.sinks[stream].rows == 10)
        append.cancel()
    [call] = server.of("AppendRows")
    with anyio.fail_after(PATIENCE):
        await call.ended.wait()

    assert append.rows is None


async def test_cancelling_an_append_that_waits_for_room_ends_the_call_on_the_server(
    server: StorageServer, api: StorageApi
) -> None:
    limits = AppendLimits(request_bytes=100_000, unacked_bytes=1)
    server.acks = anyio.Event()
    stream = await create_stream(api, TABLE)
    async with appending(api, stream, limits=limits) as append:
        await append.source.send(ids(0, 10))
        await append.source.send(ids(10, 20))
        await server.until(lambda: server.sinks[stream].rows == 10)
        append.cancel()
    with anyio.fail_after(PATIENCE):
        await server.of("AppendRows")[0].ended.wait()

    assert append.rows is None


async def test_rows_of_the_local_server_are_seen_only_once_they_are_committed(
    clients: Clients, cloud: Cloud, put: Put
) -> None:
    api = clients.storage
    table = await put(pa.table({"id": pa.array([], pa.int64())}))

    async def count() -> int:
        return await anyio.to_thread.run_sync(cloud.count, str(table))

    first = await append_all(api, batches_of(1000, 100), table)
    second = await append_all(api, [ids(1000, 1500)], table)
    assert await finalize_stream(api, first.stream) == 1000
    assert await finalize_stream(api, second.stream) == 500
    assert await count() == 0

    await commit_streams(api, table, [first.stream, second.stream])

    rows = await anyio.to_thread.run_sync(cloud.rows, str(table), "id")
    assert [row["id"] for row in rows] == list(range(1500))


async def test_a_cancelled_append_leaves_nothing_in_the_local_servers_table(
    clients: Clients, cloud: Cloud, put: Put
) -> None:
    table = await put(pa.table({"id": [-1]}))
    stream = await create_stream(clients.storage, table)
    answered = anyio.Event()
    async with appending(clients.storage, stream) as append:
        append.acked = Notes(answered)
        await append.source.send(ids(0, 10))
        await answered.wait()
        append.cancel()

    rows = await anyio.to_thread.run_sync(cloud.rows, str(table))
    assert [row["id"] for row in rows] == [-1]


class Notes(list):
    """A list that tells when something is added to it."""

    def __init__(self, added: anyio.Event) -> None:
        super().__init__()
        self._added = added

    def append(self, item: int) -> None:
        super().append(item)
        self._added.set()


async def test_a_cut_connection_to_the_local_server_loses_no_row_and_doubles_none(
    settings: Settings, clients: Clients, cloud: Cloud, put: Put
) -> None:
    rows = 60_000
    table = await put(pa.table({"id": pa.array([], pa.int64())}))
    host = settings.bigquery_storage_emulator_host
    assert host is not None
    async with (
        cutting_proxy(host, [150_000], towards_server=True) as proxy,
        storage_api(proxy.address) as api,
    ):
        append = await append_all(api, batches_of(rows, 6_000), table)
    assert await finalize_stream(clients.storage, append.stream) == rows
    await commit_streams(clients.storage, table, [append.stream])

    found = await anyio.to_thread.run_sync(cloud.rows, str(table), "id")
    assert [row["id"] for row in found] == list(range(rows))
    assert proxy.dropped >= 1


async def test_the_local_server_refuses_rows_that_do_not_fit_its_table(
    clients: Clients, put: Put
) -> None:
    table = await put(pa.table({"id": [1]}))
    batch = pa.record_batch({"id": ["a"]})

    with pytest.raises((TableMismatch, InvalidRequest), match="refused"):
        await append_all(clients.storage, [batch], table, schema=batch.schema)


# Streams: created, finished, committed


async def test_a_stream_is_created_pending_and_in_its_table(
    server: StorageServer, api: StorageApi
) -> None:
    name = await create_stream(api, TABLE)

    [call] = server.of("CreateWriteStream")
    assert call.request.parent == TABLE.resource
    assert call.request.write_stream.type_ == types.WriteStream.Type.PENDING
    assert call.metadata["x-goog-request-params"] == f"parent={TABLE.resource}"
    assert name in server.sinks


async def test_a_table_that_is_not_known_yet_is_asked_for_again(
    server: StorageServer, api: StorageApi
) -> None:
    server.replies["CreateWriteStream"].extend([Fault(CODES.NOT_FOUND), LOST])

    assert await create_stream(api, TABLE) in server.sinks
    assert len(server.of("CreateWriteStream")) == 3


async def test_a_table_that_is_never_known_is_named(server: StorageServer, api: StorageApi) -> None:
    server.replies["CreateWriteStream"].extend([Fault(CODES.NOT_FOUND)] * 100)

    with stamina.set_testing(False), pytest.raises(NotFound, match=str(TABLE)):
        await create_stream(api, TABLE, retry_seconds=0.01)


async def test_a_refused_stream_is_not_asked_for_again(
    server: StorageServer, api: StorageApi
) -> None:
    server.replies["CreateWriteStream"].append(Fault(CODES.PERMISSION_DENIED))

    with pytest.raises(AccessDenied, match=str(TABLE)):
        await create_stream(api, TABLE)
    assert len(server.of("CreateWriteStream")) == 1


async def test_finishing_a_stream_tells_how_many_rows_it_has(
    server: StorageServer, api: StorageApi
) -> None:
    append = await append_all(api, batches_of(35, 10))
    server.replies["FinalizeWriteStream"].extend([LOST, LOST_APPLIED])

    assert await finalize_stream(api, append.stream) == 35
    assert server.sinks[append.stream].finalized
    call = server.of("FinalizeWriteStream")[-1]
    assert call.metadata["x-goog-request-params"] == f"name={append.stream}"


async def finished_streams(api: StorageApi, count: int = 2) -> list[str]:
    names = [(await append_all(api, [ids(0, 5)])).stream for _ in range(count)]
    for name in names:
        await finalize_stream(api, name)
    return names


async def test_all_streams_of_a_run_are_committed_by_one_call(
    server: StorageServer, api: StorageApi
) -> None:
    streams = await finished_streams(api, 3)
    await commit_streams(api, TABLE, streams)

    [call] = server.of("BatchCommitWriteStreams")
    assert list(call.request.write_streams) == streams
    assert call.request.parent == TABLE.resource
    assert all(server.sinks[name].committed for name in streams)


@pytest.mark.parametrize("fault", [LOST, LOST_APPLIED, RESET], ids=str)
async def test_a_commit_whose_answer_is_lost_is_asked_for_again(
    server: StorageServer, api: StorageApi, fault: Fault
) -> None:
    streams = await finished_streams(api)
    server.replies["BatchCommitWriteStreams"].append(fault)
    await commit_streams(api, TABLE, streams)

    assert len(server.of("BatchCommitWriteStreams")) == 2
    assert all(server.sinks[name].committed for name in streams)


async def test_streams_that_were_committed_before_are_a_success(
    server: StorageServer, api: StorageApi
) -> None:
    streams = await finished_streams(api)
    await commit_streams(api, TABLE, streams)
    await commit_streams(api, TABLE, streams)

    assert len(server.of("BatchCommitWriteStreams")) == 2


def commit_errors(*codes: int) -> Any:
    errors = [types.StorageError.pb()(code=code, entity=f"s/{code}") for code in codes]
    return types.BatchCommitWriteStreamsResponse.pb()(stream_errors=errors)


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ([ERRORS.STREAM_NOT_FOUND], "STREAM_NOT_FOUND"),
        ([ERRORS.INVALID_STREAM_STATE] * 2, "(INVALID_STREAM_STATE)"),
        (
            [ERRORS.STREAM_ALREADY_COMMITTED, ERRORS.STREAM_NOT_FOUND],
            "(STREAM_ALREADY_COMMITTED, STREAM_NOT_FOUND)",
        ),
        ([], "(no reason given)"),
        ([4711], "(4711)"),
    ],
)
async def test_an_answer_without_a_commit_time_is_no_commit(
    server: StorageServer, api: StorageApi, codes: list[int], told: str
) -> None:
    server.replies["BatchCommitWriteStreams"].append(commit_errors(*codes))

    with pytest.raises(IntegrityError) as raised:
        await commit_streams(api, TABLE, ["s"])
    assert told in str(raised.value)
    assert "Nothing was written" in str(raised.value)


async def test_a_commit_that_is_never_answered_does_not_say_that_nothing_was_written(
    server: StorageServer, api: StorageApi
) -> None:
    streams = await finished_streams(api)
    server.replies["BatchCommitWriteStreams"].extend([LOST_APPLIED] * 1000)

    with stamina.set_testing(False), pytest.raises(Unavailable) as raised:
        await commit_streams(api, TABLE, streams, retry_seconds=0.01)
    assert "Nothing was written" not in str(raised.value)
    assert str(TABLE) in str(raised.value)


async def test_a_commit_that_is_refused_is_not_asked_for_again(
    server: StorageServer, api: StorageApi
) -> None:
    server.replies["BatchCommitWriteStreams"].append(Fault(CODES.PERMISSION_DENIED))

    with pytest.raises(AccessDenied):
        await commit_streams(api, TABLE, ["s"])
    assert len(server.of("BatchCommitWriteStreams")) == 1
