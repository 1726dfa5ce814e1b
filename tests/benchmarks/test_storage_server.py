"""The server of the benchmarks gives every row once, and takes no append that it should not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import grpc
import pyarrow as pa
import pytest
from google.cloud.bigquery_storage_v1 import types
from google.rpc import code_pb2

from benchmarks import tables
from benchmarks.storage_server import DATASET, Append, Counted, Synthetic, synthetic_servers
from mlsys.append import (
    AppendLimits,
    append_stream,
    commit_streams,
    create_stream,
    finalize_stream,
)
from mlsys.clients import Clients, StorageApi, open_clients
from mlsys.errors import InvalidRequest, NotFound
from mlsys.local import PROJECT
from mlsys.names import TableRef
from mlsys.read import ReadSession, open_session, read_stream
from mlsys.settings import Compression
from mlsys.tables import TableInfo, check_dataset, create_table, find_table

pytestmark = pytest.mark.anyio

ROWS = 25_001
OUTPUT = TableRef(PROJECT, DATASET, "out")
LIMITS = AppendLimits(request_bytes=2**20, unacked_bytes=2**20)


@pytest.fixture(scope="module")
def running() -> Iterator[Synthetic]:
    with synthetic_servers() as synthetic:
        yield synthetic


@pytest.fixture
def server(running: Synthetic) -> Iterator[Synthetic]:
    """The server, which counts anew, and is as it was after the test."""
    running.anew()
    yield running
    running.set(paused=False, pause_after=0, first_share=0, message_bytes=tables.MESSAGE_BYTES)


@pytest.fixture
async def clients(server: Synthetic) -> AsyncIterator[Clients]:
    async with open_clients(server.servers.settings()) as opened:
        yield opened


@pytest.fixture
def api(clients: Clients) -> StorageApi:
    return clients.storage


async def counted(server: Synthetic) -> Counted:
    return await anyio.to_thread.run_sync(server.counted)


async def told(server: Synthetic, **options: Any) -> None:
    await anyio.to_thread.run_sync(lambda: server.set(**options))


def source(kind: str = tables.NUMERIC, rows: int = ROWS) -> TableRef:
    return TableRef(PROJECT, DATASET, tables.Shape(kind, rows).name)


async def session_of(api: StorageApi, table: TableRef, **more: Any) -> ReadSession:
    return await open_session(api, table, project=PROJECT, **more)


async def read(api: StorageApi, session: ReadSession, stream: str) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = []
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](0)
    async with anyio.create_task_group() as tasks, received:
        tasks.start_soon(read_stream, api, session, stream, sent)
        async for batch in received:
            batch.validate(full=True)
            batches.append(batch)
    return batches


@pytest.mark.parametrize("kind", [tables.NUMERIC, tables.MIXED, tables.TEXT])
@pytest.mark.parametrize("streams", [1, 3])
async def test_streams_hold_exactly_the_rows_of_the_table(
    api: StorageApi, server: Synthetic, kind: str, streams: int
) -> None:
    session = await session_of(api, source(kind), max_streams=streams)
    counts = [sum(b.num_rows for b in await read(api, session, s)) for s in session.streams]

    assert len(counts) == streams
    assert sum(counts) == ROWS == (await counted(server)).rows_read
    assert max(counts) - min(counts) <= 1
    assert session.schema == tables.schema(kind)


@pytest.mark.parametrize(("first", "counts"), [(0.9, [22_501, 1250, 1250]), (1, [ROWS, 0, 0])])
async def test_the_first_stream_may_have_a_share_of_its_own(
    api: StorageApi, server: Synthetic, first: float, counts: list[int]
) -> None:
    await told(server, first_share=first)
    session = await session_of(api, source(), max_streams=3)
    read_of = [await read(api, session, stream) for stream in session.streams]

    assert [sum(batch.num_rows for batch in each) for each in read_of] == counts


async def test_messages_are_about_as_large_as_told(api: StorageApi, server: Synthetic) -> None:
    await told(server, message_bytes=100_000)
    session = await session_of(api, source())
    sizes = [b.nbytes for b in await read(api, session, session.streams[0])]

    assert all(90_000 < size < 110_000 for size in sizes[:-1])


async def test_only_the_selected_columns_come_in_the_order_of_the_table(api: StorageApi) -> None:
    session = await session_of(api, source(), columns=["i0", "f3", "id"])
    [first, *_] = await read(api, session, session.streams[0])

    assert session.schema.names == first.schema.names == ["id", "f3", "i0"]


async def test_a_table_without_rows_has_no_streams(api: StorageApi) -> None:
    assert (await session_of(api, source(rows=0))).streams == ()


@pytest.mark.parametrize("offset", [0, 1, 11_000, 24_999, ROWS])
async def test_a_stream_resumes_at_an_offset(api: StorageApi, offset: int) -> None:
    session = await session_of(api, source())
    whole = pa.Table.from_batches(await read(api, session, session.streams[0]))
    request = types.ReadRowsRequest.pb()(read_stream=session.streams[0], offset=offset)
    rest = [
        pa.ipc.read_record_batch(pa.py_buffer(data), session.schema)
        async for data in api.read_rows(request)
    ]

    assert pa.Table.from_batches(rest, session.schema).equals(whole.slice(offset))


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
async def test_rows_are_compressed_as_asked_for(
    api: StorageApi, server: Synthetic, codec: Compression
) -> None:
    plain = await session_of(api, source(tables.MIXED))
    session = await session_of(api, source(tables.MIXED), compression=codec)

    small = await read(api, session, session.streams[0])
    less = (await counted(server)).bytes_read
    same = await read(api, plain, plain.streams[0])

    assert pa.Table.from_batches(small).equals(pa.Table.from_batches(same))
    assert less < 0.7 * ((await counted(server)).bytes_read - less)


async def test_other_tables_columns_and_filters_are_refused(api: StorageApi) -> None:
    with pytest.raises(NotFound):
        await session_of(api, TableRef(PROJECT, DATASET, "other"))
    with pytest.raises(InvalidRequest):
        await session_of(api, source(), columns=["other"])
    with pytest.raises(InvalidRequest):
        await session_of(api, source(), where="id > 3")


# Appends


def batch_of(rows: int) -> pa.RecordBatch:
    return tables.made_up(tables.MIXED, rows)


def request_of(
    stream: str, batch: pa.RecordBatch, offset: int | None, *, schema: bool = True
) -> Any:
    request = types.AppendRowsRequest.pb()(write_stream=stream)
    if offset is not None:
        request.offset.value = offset
    request.arrow_rows.rows.serialized_record_batch = batch.serialize().to_pybytes()
    if schema:
        request.arrow_rows.writer_schema.serialized_schema = batch.schema.serialize().to_pybytes()
    return request


async def answer_to(api: StorageApi, *requests: Any) -> Any:
    """The last answer on a connection with these requests."""
    call = api.append_rows(iter([request.SerializeToString() for request in requests]))
    return [answer async for answer in call][-1]


async def test_what_a_run_appends_is_counted_and_committed(
    api: StorageApi, server: Synthetic
) -> None:
    stream = await create_stream(api, OUTPUT)
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](3)
    async with sent:
        for rows in (1, 999, 2000):
            await sent.send(batch_of(rows))
    schema = tables.schema(tables.MIXED)

    assert await append_stream(api, stream, schema, received, limits=LIMITS) == 3000
    assert await finalize_stream(api, stream) == 3000
    await commit_streams(api, OUTPUT, [stream])

    seen = await counted(server)
    assert (seen.rows_appended, seen.appends, seen.rows_committed) == (3000, 3, 3000)
    assert seen.ids_appended == sum(range(999)) + sum(range(2000))
    assert seen.errors == {}


@pytest.mark.parametrize(
    ("offset", "code"),
    [(3, 0), (None, 0), (2, code_pb2.ALREADY_EXISTS), (4, code_pb2.OUT_OF_RANGE)],
)
async def test_an_append_has_to_follow_the_last_one(
    api: StorageApi, server: Synthetic, offset: int | None, code: int
) -> None:
    stream = await create_stream(api, OUTPUT)
    first = request_of(stream, batch_of(3), 0)
    answer = await answer_to(api, first, request_of(stream, batch_of(2), offset, schema=False))

    assert answer.error.code == code
    assert (await finalize_stream(api, stream)) == (3 if code else 5)
    if not code:
        assert answer.append_result.offset.value == 3


async def test_nothing_is_appended_after_the_end(api: StorageApi) -> None:
    stream = await create_stream(api, OUTPUT)
    await finalize_stream(api, stream)

    answer = await answer_to(api, request_of(stream, batch_of(3), 0))
    assert answer.error.code == code_pb2.INVALID_ARGUMENT


async def test_an_append_that_is_no_rows_is_refused(api: StorageApi) -> None:
    stream = await create_stream(api, OUTPUT)
    request = request_of(stream, batch_of(3), 0)
    request.arrow_rows.rows.serialized_record_batch = b"something else"

    assert (await answer_to(api, request)).error.code == code_pb2.INVALID_ARGUMENT
    assert await finalize_stream(api, stream) == 0


async def test_appends_to_no_stream_are_refused(api: StorageApi) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer_to(api, request_of("projects/p/streams/none", batch_of(3), 0))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_paused_server_answers_when_it_goes_on(api: StorageApi, server: Synthetic) -> None:
    await told(server, pause_after=3)
    stream = await create_stream(api, OUTPUT)
    call = api.append_rows()
    await call.write(request_of(stream, batch_of(3), 0).SerializeToString())
    await call.write(request_of(stream, batch_of(2), 3).SerializeToString())
    answers: list[Any] = []

    async def listen() -> None:
        for _ in range(2):
            answers.append(await call.read())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        while not (seen := await counted(server)).rows_appended:
            pass
        assert (seen.rows_appended, answers) == (3, [])
        await told(server, paused=False)
    assert [answer.append_result.offset.value for answer in answers] == [0, 3]
    await call.done_writing()


@pytest.mark.parametrize("rows", [1, 200, 20_000])
def test_an_append_is_taken_apart_as_protobuf_says(rows: int) -> None:
    request = request_of("projects/p/datasets/d/tables/t/streams/s", batch_of(rows), 2**40)
    append = Append.parse(request.SerializeToString())

    assert append.stream == request.write_stream
    assert append.offset == request.offset.value
    assert append.rows == request.arrow_rows.rows.serialized_record_batch
    assert append.schema == request.arrow_rows.writer_schema.serialized_schema


# Tables over REST


async def test_a_table_has_columns_and_rows(clients: Clients) -> None:
    found = await find_table(clients.bigquery, source())

    assert isinstance(found, TableInfo)
    assert found.rows == ROWS
    assert [c.name for c in found.columns] == tables.schema(tables.NUMERIC).names


async def test_a_table_that_is_made_is_there(clients: Clients, api: StorageApi) -> None:
    made = TableRef(PROJECT, DATASET, "made")
    assert await find_table(clients.bigquery, made) is None
    await check_dataset(clients.bigquery, made)
    columns = (await find_table(clients.bigquery, source())).columns
    for _ in range(2):
        await create_table(clients.bigquery, made, columns)
    stream = await create_stream(api, made)
    await answer_to(api, request_of(stream, batch_of(3), 0))
    await finalize_stream(api, stream)
    await commit_streams(api, made, [stream])

    assert await find_table(clients.bigquery, made) == TableInfo(made, columns, 3)
