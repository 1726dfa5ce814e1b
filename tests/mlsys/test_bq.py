"""Frames in and out of BigQuery: as they were, all of them, or not at all."""

from __future__ import annotations

import datetime as dt
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import anyio
import anyio.to_thread
import grpc
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from blockbuster import BlockBuster
from google.cloud.bigquery import SchemaField
from google.cloud.bigquery_storage_v1 import types

from mlsys.bq import _read_whole, bq_get, bq_iter, bq_put, fitted, put_table
from mlsys.clients import Clients, StorageApi, open_clients
from mlsys.errors import (
    AccessDenied,
    Conflict,
    IntegrityError,
    InvalidRequest,
    NotFound,
    TableMismatch,
    Unavailable,
)
from mlsys.local import free_ports
from mlsys.names import TableRef
from mlsys.settings import Settings
from mlsys.tables import TableInfo, bigquery_column, create_table, find_table, standard_type
from tests.conftest import Cloud
from tests.mlsys.rest_server import Answer, Request, RestServer
from tests.mlsys.storage_server import (
    PATIENCE,
    RESET,
    Fault,
    StorageServer,
    batches_of,
    id_list,
    ids,
)

UTC = dt.UTC
DENIED = Fault(grpc.StatusCode.PERMISSION_DENIED, lasting=True)

# Values at the edges of each type that the local server keeps; it has no BIGNUMERIC.
VALUES: dict[str, tuple[pa.DataType, list[Any]]] = {
    "INT64": (pa.int64(), [0, -(2**63), 2**63 - 1]),
    "FLOAT64": (pa.float64(), [-0.0, 1e308, float("inf")]),
    "NUMERIC": (
        pa.decimal128(38, 9),
        [Decimal("0.000000001"), Decimal("-99999999999999999999999999999.999999999"), Decimal(7)],
    ),
    "BOOL": (pa.bool_(), [True, False, True]),
    "STRING": (pa.string(), ["", "a`b'c\"d\n", "🚢 ä"]),
    "BYTES": (pa.binary(), [b"", b"\x00\xff", b"abc"]),
    "DATE": (pa.date32(), [dt.date(1, 1, 1), dt.date(2024, 2, 29), dt.date(9999, 12, 31)]),
    "TIME": (pa.time64("us"), [dt.time(0), dt.time(1, 2, 3, 4), dt.time(23, 59, 59, 999_999)]),
    "DATETIME": (
        pa.timestamp("us"),
        [dt.datetime(1, 1, 1), dt.datetime(2026, 3, 1, 1, 2, 3, 4), dt.datetime(9999, 12, 31)],
    ),
    "TIMESTAMP": (
        pa.timestamp("us", "UTC"),
        [
            dt.datetime(1, 1, 1, tzinfo=UTC),
            dt.datetime(2026, 3, 1, 1, 2, 3, 4, UTC),
            dt.datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC),
        ],
    ),
}


def numbers(rows: int, start: int = 0) -> pa.Table:
    return pa.table(ids(start, start + rows))


def table_of(kind: str) -> pa.Table:
    """A column `x` of a type with a null in it, and one of arrays with an empty one in it."""
    arrow, values = VALUES[kind]
    return pa.table(
        {
            "id": pa.array(range(4), pa.int64()),
            "x": pa.array([*values, None], arrow),
            "xs": pa.array([values, [], values[:1], values[1:]], pa.list_(arrow)),
        }
    )


# There and back


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_type_come_back_as_they_were(
    settings: Settings, cloud: Cloud, kind: str
) -> None:
    data, table = table_of(kind), cloud.new_table()
    bq_put(data, table, settings=settings)
    read = bq_get(table, "arrow", settings=settings).sort_by("id")
    queried = bq_get(f"SELECT * FROM `{table}` ORDER BY id", "arrow", settings=settings)

    assert read.schema.equals(data.schema, check_metadata=True)
    assert read.to_pydict() == data.to_pydict()
    assert queried.schema.equals(data.schema, check_metadata=True)
    assert queried.to_pydict() == data.to_pydict()
    assert column_types(cloud, table) == {"id": "INT64", "x": kind, "xs": kind}


def column_types(cloud: Cloud, table: str) -> dict[str, str]:
    columns = cloud.columns(table).items()
    return {name: standard_type(SchemaField(name, kind)) for name, kind in columns}


def test_a_frame_comes_back_in_the_kind_that_was_asked_for(
    settings: Settings, cloud: Cloud
) -> None:
    table = cloud.new_table()
    bq_put(pl.DataFrame({"id": [1, 2], "name": ["a", None]}), table, settings=settings)
    bq_put(pd.DataFrame({"id": [3], "name": ["c"]}), table, settings=settings)
    pandas = bq_get(table, settings=settings).sort_values("id", ignore_index=True)
    polars = bq_get(table, "polars", settings=settings).sort("id")

    assert {name: str(kind) for name, kind in pandas.dtypes.items()} == {
        "id": "Int64",
        "name": "str",
    }
    assert pandas["id"].tolist() == [1, 2, 3]
    assert polars.to_dicts() == [
        {"id": 1, "name": "a"},
        {"id": 2, "name": None},
        {"id": 3, "name": "c"},
    ]


def test_a_large_table_is_read_whole_and_each_row_once(settings: Settings, cloud: Cloud) -> None:
    table = cloud.put(numbers(300_000))
    read = bq_get(table, "arrow", settings=settings)

    assert sorted(id_list([read])) == list(range(300_000))


def test_a_table_without_rows_has_its_columns(settings: Settings, cloud: Cloud) -> None:
    table = cloud.new_table()
    bq_put(numbers(0), table, settings=settings)

    assert bq_get(table, "arrow", settings=settings).equals(numbers(0))
    assert bq_get(f"SELECT * FROM `{table}`", "arrow", settings=settings).equals(numbers(0))
    assert list(bq_get(table, settings=settings).columns) == ["id"]
    assert list(bq_iter(table, settings=settings)) == []


def test_a_view_is_read_by_a_query(settings: Settings, cloud: Cloud) -> None:
    table, view = cloud.put(numbers(5)), cloud.new_table("view")
    cloud.query(f"CREATE VIEW `{view}` AS SELECT id * 10 AS ten FROM `{table}`")

    read = bq_get(view, "arrow", settings=settings)
    assert sorted(read.column("ten").to_pylist()) == [0, 10, 20, 30, 40]


def test_a_statement_without_a_result_gives_no_rows(settings: Settings, cloud: Cloud) -> None:
    table = cloud.put(numbers(5))

    done = bq_get(f"DELETE FROM `{table}` WHERE id > 1", "arrow", settings=settings)
    assert done.num_rows == 0
    assert cloud.count(table) == 2


# In chunks


@pytest.mark.parametrize("source", ["{}", "SELECT * FROM `{}` ORDER BY id"])
def test_chunks_have_the_rows_that_were_asked_for(
    settings: Settings, cloud: Cloud, source: str
) -> None:
    query = source.format(cloud.put(numbers(1000)))
    chunks = list(bq_iter(query, chunk_rows=300, frame="arrow", settings=settings))

    assert [chunk.num_rows for chunk in chunks] == [300, 300, 300, 100]
    assert sorted(id_list(chunks)) == list(range(1000))
    assert all(chunk.schema.equals(numbers(0).schema, check_metadata=True) for chunk in chunks)


@pytest.mark.parametrize("frame", ["pandas", "polars", "arrow"])
def test_chunks_are_frames_of_the_kind_that_was_asked_for(
    settings: Settings, cloud: Cloud, frame: Any
) -> None:
    table = cloud.put(numbers(3))
    kinds = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "arrow": pa.Table}

    for chunk in bq_iter(table, chunk_rows=2, frame=frame, settings=settings):
        assert isinstance(chunk, kinds[frame])


# What is refused before anything is asked


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: bq_get("my-project.d.t", "spark"), "frame is 'spark'. Use one of pandas, polars"),
        (lambda: bq_iter("my-project.d.t", frame="spark"), "frame is 'spark'"),
        (lambda: bq_iter("my-project.d.t", chunk_rows=0), "chunk_rows is 0"),
        (lambda: bq_put(numbers(1), "my-project.d.t", "WRITE_OVER"), "WRITE_APPEND"),
        (lambda: bq_put(numbers(1), "d.t"), "is not a table path"),
        (lambda: bq_put([1, 2], "my-project.d.t"), "A list is no frame"),
        (lambda: bq_get("d.t"), "is not a table path"),
    ],
)
def test_what_can_not_be_meant_is_refused(
    call: Callable[[], object], told: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bigquery_emulator_host", "bigquery_storage_emulator_host"):
        monkeypatch.setenv(name.upper(), getattr(settings, name))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", str(settings.storage_emulator_host))

    with pytest.raises(InvalidRequest, match=told):
        call()


def test_what_is_not_there_is_named(settings: Settings, cloud: Cloud) -> None:
    table = cloud.new_table()

    with pytest.raises(NotFound, match=table):
        bq_get(table, settings=settings)
    with pytest.raises(NotFound, match=table):
        list(bq_iter(table, settings=settings))
    with pytest.raises(NotFound, match=table):
        bq_get(f"SELECT * FROM `{table}`", settings=settings)
    with pytest.raises(NotFound, match=r"The dataset mlsys-local\.nowhere does not exist"):
        bq_put(numbers(1), "mlsys-local.nowhere.t", settings=settings)


def test_a_query_that_is_refused_is_told_in_bigquerys_words(
    settings: Settings, cloud: Cloud
) -> None:
    with pytest.raises(InvalidRequest, match='Unexpected identifier "SELEC"') as raised:
        bq_get("SELEC 1", settings=settings)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("source", ["my-project.d.t", "SELECT 1"])
def test_a_server_that_is_not_there_is_given_up_in_the_time_that_was_set(source: str) -> None:
    [port] = free_ports(1)
    nobody = f"http://127.0.0.1:{port}"
    settings = Settings(
        _env_file=None,
        gcp_project_id="my-project",
        bigquery_emulator_host=nobody,
        bigquery_storage_emulator_host=f"127.0.0.1:{port}",
        storage_emulator_host=nobody,
        retry_seconds=0.01,
    )
    with pytest.raises(Unavailable):
        bq_get(source, settings=settings)


# Writing


def test_rows_are_added_by_default(settings: Settings, cloud: Cloud) -> None:
    table = cloud.new_table()
    bq_put(numbers(2), table, settings=settings)
    bq_put(numbers(2, start=2), table, settings=settings)
    bq_put(numbers(0), table, settings=settings)

    assert [row["id"] for row in cloud.rows(table, "id")] == [0, 1, 2, 3]


def test_a_table_is_replaced_with_its_columns(settings: Settings, cloud: Cloud) -> None:
    table = cloud.put(numbers(5))
    bq_put(pa.table({"name": ["a"]}), table, "WRITE_TRUNCATE", settings=settings)

    assert cloud.rows(table) == [{"name": "a"}]
    assert_no_staging(cloud, table)


@pytest.mark.parametrize("disposition", ["WRITE_APPEND", "WRITE_TRUNCATE", "WRITE_EMPTY"])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_table_that_is_missing_is_made(
    settings: Settings, cloud: Cloud, disposition: Any, rows: int
) -> None:
    table = cloud.new_table()
    bq_put(numbers(rows), table, disposition, settings=settings)

    assert cloud.count(table) == rows
    assert column_types(cloud, table) == {"id": "INT64"}
    assert_no_staging(cloud, table)


def test_a_table_with_rows_is_not_added_to_where_it_has_to_be_empty(
    settings: Settings, cloud: Cloud
) -> None:
    table = cloud.new_table()
    bq_put(numbers(0), table, settings=settings)
    bq_put(numbers(2), table, "WRITE_EMPTY", settings=settings)
    with pytest.raises(Conflict, match=table):
        bq_put(numbers(2), table, "WRITE_EMPTY", settings=settings)

    assert cloud.count(table) == 2


def test_a_frame_that_does_not_fit_is_refused_with_every_column_that_does_not(
    settings: Settings, cloud: Cloud
) -> None:
    table = cloud.put(pa.table({"id": [1], "name": ["a"], "at": pa.array([None], pa.date32())}))
    frame = pa.table({"ID": ["no number"], "name": [2.5], "more": [1], "at": [7]})

    with pytest.raises(TableMismatch) as raised:
        bq_put(frame, table, settings=settings)
    for column in ("ID is INT64, not string", "no column more", "at is DATE, not int64"):
        assert column in str(raised.value)
    assert cloud.count(table) == 1


def assert_no_staging(cloud: Cloud, table: str) -> None:
    dataset, _, name = table.rpartition(".")
    tables = [found.table_id for found in cloud.clients.bigquery.list_tables(dataset)]
    assert [found for found in tables if name in found] == [name]


def existing(**columns: pa.DataType) -> TableInfo:
    fields = [bigquery_column(pa.field(name, kind)) for name, kind in columns.items()]
    return TableInfo(TableRef("my-project", "d", "t"), tuple(fields), 0)


def test_columns_are_brought_to_the_types_of_the_table_where_nothing_is_lost() -> None:
    data = pa.table(
        {
            "FARE": [1, 2],
            "price": pa.array([Decimal("1.5"), None], pa.decimal128(38, 9)),
            "none": pa.array([None, None], pa.string()),
            "nones": pa.array([None, None], pa.string()),
        }
    )
    table = existing(
        fare=pa.float64(),
        price=pa.decimal256(76, 38),
        none=pa.timestamp("us", "UTC"),
        nones=pa.list_(pa.int64()),
    )
    fit = fitted(data, table)

    assert fit.column_names == ["fare", "price", "none", "nones"]
    assert fit.column("fare").to_pylist() == [1.0, 2.0]
    assert fit.column("price").to_pylist() == [Decimal("1.5"), None]
    assert fit.schema.field("none").type == pa.timestamp("us", "UTC")
    assert fit.column("nones").to_pylist() == [[], []]


NUMERIC, BIGNUMERIC = pa.decimal128(38, 9), pa.decimal256(76, 38)
TIMESTAMP, DATETIME = pa.timestamp("us", "UTC"), pa.timestamp("us")


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (pa.array([19.99, 1e-9, None]), NUMERIC, [Decimal("19.99"), Decimal("1e-9"), None]),
        (pa.array([Decimal("19.99")], NUMERIC), pa.float64(), [19.99]),
        (pa.array([[19.99, 0.5]]), pa.list_(NUMERIC), [[Decimal("19.99"), Decimal("0.5")]]),
        (pa.array([Decimal(7)], BIGNUMERIC), pa.int64(), [7]),
        (pa.array([Decimal("1e-9")], BIGNUMERIC), NUMERIC, [Decimal("1e-9")]),
        (pa.array([dt.date(2020, 6, 1)]), TIMESTAMP, [dt.datetime(2020, 6, 1, tzinfo=UTC)]),
        (pa.array([[dt.datetime(2020, 6, 1)]], pa.list_(DATETIME)), pa.list_(pa.date32()), None),
        (pa.array(["2020-06-01", None]), pa.date32(), [dt.date(2020, 6, 1), None]),
        (pa.array(["2020-06-01T01:00:00+01:00"]), TIMESTAMP, [dt.datetime(2020, 6, 1, tzinfo=UTC)]),
    ],
    ids=str,
)
def test_values_are_converted_to_the_very_same(
    values: pa.Array, kind: pa.DataType, expected: list[object] | None
) -> None:
    fit = fitted(pa.table({"x": values}), existing(x=kind))

    assert fit.schema.field("x").type == kind
    assert fit.column("x").to_pylist() == (expected or [[dt.date(2020, 6, 1)]])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([1 / 3]), NUMERIC),
        (pa.array([float("nan")]), NUMERIC),
        (pa.array([Decimal("123456789.123456789")], NUMERIC), pa.float64()),
        (pa.array([Decimal("0.5")], NUMERIC), pa.int64()),
        (pa.array([[1 / 3]]), pa.list_(NUMERIC)),
        (pa.array(["00123"]), pa.int64()),
        (pa.array(["1e400"]), pa.float64()),
        (pa.array(["1"]), NUMERIC),
        (pa.array(["true"]), pa.bool_()),
        (pa.array([["00123"]]), pa.list_(pa.int64())),
        (pa.array([5]), pa.string()),
        (pa.array([True]), pa.int64()),
        (pa.array([b"\xff"]), pa.string()),
        (pa.array([[1]]), pa.list_(pa.bool_())),
        (pa.array([[1]]), pa.list_(TIMESTAMP)),
        (pa.array([[dt.datetime(2020, 6, 1, 12)]], pa.list_(DATETIME)), pa.list_(pa.date32())),
        (pa.array([dt.datetime(2020, 6, 1, 12)], DATETIME), pa.time64("us")),
        (pa.array(["2020-06-01 12:00:00"]), pa.date32()),
        (pa.array([1.5]), pa.int64()),
        (pa.array([2**53 + 1]), pa.float64()),
        (pa.array([1]), pa.bool_()),
        (pa.array([1]), pa.date32()),
        (pa.array([0.5]), pa.timestamp("us")),
        (pa.array(["x"]), pa.float64()),
        (pa.array([[1]]), pa.int64()),
        (pa.array([1]), pa.list_(pa.int64())),
    ],
    ids=str,
)
def test_a_column_that_would_lose_something_is_refused(values: pa.Array, kind: pa.DataType) -> None:
    with pytest.raises(TableMismatch, match=r"can't take the frame: x is "):
        fitted(pa.table({"x": values}), existing(x=kind))


# On a server that fails when it is told to


@pytest.fixture
def streamed(server: StorageServer, settings: Settings, cloud: Cloud) -> Settings:
    """Settings by which tables are the local server's, but their rows come from `server`."""
    return settings.model_copy(update={"bigquery_storage_emulator_host": server.address})


async def in_thread[T](call: Callable[[], T]) -> T:
    with anyio.fail_after(PATIENCE):
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("query", "streams"),
    [("SELECT 1 AS id", 8), ("SELECT 1 AS id\nORDER  BY id", 1), ("select 1 as id order by 1", 1)],
)
async def test_a_querys_result_is_streamed_by_one_stream_only_where_it_has_an_order(
    server: StorageServer, streamed: Settings, query: str, streams: int
) -> None:
    streamed = streamed.model_copy(update={"read_streams": 8})
    server.sources["s"] = [ids(0, 10)]
    table = await in_thread(lambda: bq_get(query, "arrow", settings=streamed))

    assert id_list([table]) == list(range(10))
    [call] = server.of("CreateReadSession")
    assert call.request.max_stream_count == streams


@pytest.mark.anyio
async def test_the_same_table_gives_the_same_frame_whichever_stream_is_faster(
    server: StorageServer, streamed: Settings
) -> None:
    server.sources |= {"s/0": batches_of(1000, 10), "s/1": [ids(1000, 1001)], "s/2": []}
    table = await in_thread(lambda: bq_get("SELECT 1 AS id", "arrow", settings=streamed))

    assert id_list([table]) == list(range(1001))


@pytest.mark.anyio
async def test_no_rows_of_a_broken_read_are_taken_for_the_end(
    server: StorageServer, streamed: Settings
) -> None:
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].append((35, DENIED))
    seen: list[pa.Table] = []

    def read() -> None:
        chunks = bq_iter("SELECT 1 AS id", chunk_rows=20, frame="arrow", settings=streamed)
        seen.extend(chunks)

    with pytest.raises(AccessDenied):
        await in_thread(read)
    assert id_list(seen) == list(range(20))


@pytest.mark.anyio
async def test_a_loop_that_is_left_early_ends_the_read(
    server: StorageServer, streamed: Settings
) -> None:
    server.sources["s"] = itertools.repeat(ids(0, 1000))

    def read() -> None:
        for chunk in bq_iter("SELECT 1 AS id", chunk_rows=10, settings=streamed):
            assert len(chunk) == 10
            break

    await in_thread(read)
    with anyio.fail_after(PATIENCE):
        await server.of("ReadRows")[0].ended.wait()


@pytest.mark.anyio
@pytest.mark.usefixtures("no_backoff")
async def test_a_read_that_breaks_is_taken_up_again(
    server: StorageServer, streamed: Settings
) -> None:
    server.sources["s"] = batches_of(100, 10)
    server.replies["ReadRows"].append((35, RESET))
    table = await in_thread(lambda: bq_get("SELECT 1 AS id", "arrow", settings=streamed))

    assert id_list([table]) == list(range(100))


@pytest.fixture
def half(clients: Clients, api: StorageApi, cloud: Cloud) -> Clients:
    """Clients by which tables are the local server's, but rows go to `server`."""
    return replace(clients, storage=api)


async def new_table(clients: Clients, cloud: Cloud) -> TableRef:
    table = TableRef.parse(cloud.new_table())
    await create_table(clients.bigquery, table, [bigquery_column(pa.field("id", pa.int64()))])
    return table


@pytest.mark.anyio
async def test_progress_is_told_as_rows_are_acknowledged(
    server: StorageServer, half: Clients, settings: Settings, cloud: Cloud
) -> None:
    told: list[tuple[int, int | None]] = []
    await put_table(
        half,
        settings,
        numbers(200_000),
        await new_table(half, cloud),
        show=lambda done, total: told.append((done, total)),
    )

    assert told[-1] == (200_000, 200_000)
    assert len(told) > 1
    assert told == sorted(told)
    [sink] = server.sinks.values()
    assert sink.committed
    assert id_list(sink.batches) == list(range(200_000))


@pytest.mark.anyio
@pytest.mark.parametrize("rows", [0, 3])
async def test_rows_that_are_not_counted_yet_keep_a_table_from_being_empty(
    server: StorageServer, half: Clients, settings: Settings, cloud: Cloud, rows: int
) -> None:
    table = await new_table(half, cloud)
    server.sources["s"] = [ids(0, 0), ids(0, rows)]

    if rows:
        with pytest.raises(Conflict, match=f"{table} has rows already"):
            await put_table(half, settings, numbers(10), table, "WRITE_EMPTY")
    else:
        await put_table(half, settings, numbers(10), table, "WRITE_EMPTY")
    assert len(server.of("BatchCommitWriteStreams")) == (not rows)


@pytest.mark.anyio
async def test_a_query_that_nobody_waits_for_any_longer_is_cancelled(rest: RestServer) -> None:
    waited_for, cancelled = threading.Event(), threading.Event()

    def answer(request: Request) -> Answer:
        if request.path.endswith("/cancel"):
            cancelled.set()
        elif request.method == "GET":
            waited_for.set()
            cancelled.wait(PATIENCE)
        job = {"jobReference": {"projectId": "my-project", "jobId": "j", "location": "EU"}}
        state = {"status": {"state": "RUNNING"}, "configuration": {"query": {"query": "x"}}}
        return 200, job | state | {"job": job, "jobComplete": False}

    rest.answer = answer
    settings = Settings(
        _env_file=None,
        gcp_project_id="my-project",
        bigquery_emulator_host=rest.url,
        bigquery_storage_emulator_host="127.0.0.1:9",
        storage_emulator_host="http://127.0.0.1:9",
    )
    async with open_clients(settings) as clients, anyio.create_task_group() as tasks:
        sql = "SELECT 1 AS id"
        tasks.start_soon(_read_whole, clients, settings, sql, lambda done, total: None)
        await in_thread(lambda: waited_for.wait(PATIENCE))
        tasks.cancel_scope.cancel()

    assert cancelled.is_set()


@pytest.mark.anyio
async def test_a_frame_that_is_refused_half_way_is_not_committed(
    server: StorageServer, half: Clients, settings: Settings, cloud: Cloud
) -> None:
    table = await new_table(half, cloud)
    server.steps[65_536] = DENIED

    with pytest.raises(AccessDenied):
        await put_table(half, settings, numbers(200_000), table)
    assert server.of("FinalizeWriteStream") == server.of("BatchCommitWriteStreams") == []


@pytest.mark.anyio
async def test_a_stream_with_another_number_of_rows_is_not_committed(
    server: StorageServer, half: Clients, settings: Settings, cloud: Cloud
) -> None:
    table = await new_table(half, cloud)
    short = types.FinalizeWriteStreamResponse.pb()(row_count=9)
    server.replies["FinalizeWriteStream"].append(short)

    with pytest.raises(IntegrityError, match="did not take every row"):
        await put_table(half, settings, numbers(10), table)
    assert server.of("BatchCommitWriteStreams") == []


@pytest.mark.anyio
async def test_a_replacement_that_fails_leaves_the_old_rows_and_nothing_else(
    server: StorageServer, half: Clients, clients: Clients, settings: Settings, cloud: Cloud
) -> None:
    table = TableRef.parse(cloud.new_table())
    await put_table(clients, settings, numbers(3), table)
    server.steps[0] = DENIED

    with pytest.raises(AccessDenied):
        await put_table(half, settings, numbers(10), table, "WRITE_TRUNCATE")
    await in_thread(lambda: assert_no_staging(cloud, str(table)))
    assert await in_thread(lambda: cloud.count(str(table))) == 3


@pytest.mark.anyio
async def test_a_replacement_that_is_cancelled_leaves_the_old_rows_and_nothing_else(
    server: StorageServer, half: Clients, clients: Clients, settings: Settings, cloud: Cloud
) -> None:
    table = TableRef.parse(cloud.new_table())
    await put_table(clients, settings, numbers(3), table)
    server.acks = anyio.Event()
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(put_table, half, settings, numbers(10), table, "WRITE_TRUNCATE")
            await server.until(lambda: any(call.requests for call in server.of("AppendRows")))
            tasks.cancel_scope.cancel()
        await server.of("AppendRows")[0].ended.wait()

    await in_thread(lambda: assert_no_staging(cloud, str(table)))
    assert await in_thread(lambda: cloud.count(str(table))) == 3


@pytest.mark.anyio
async def test_a_new_table_is_known_by_its_columns_at_once(
    clients: Clients, settings: Settings, cloud: Cloud
) -> None:
    table = TableRef.parse(cloud.new_table())
    await put_table(clients, settings, numbers(1), table)
    found = await find_table(clients.bigquery, table)

    assert found is not None
    assert [column.name for column in found.columns] == ["id"]


# In a notebook


@pytest.mark.anyio
async def test_they_work_where_a_loop_runs_already(
    settings: Settings, cloud: Cloud, no_blocking_calls: BlockBuster
) -> None:
    """As in a notebook, whose loop they do block."""
    table = cloud.new_table()
    no_blocking_calls.deactivate()
    try:
        bq_put(numbers(3), table, settings=settings)
        assert bq_get(table, "arrow", settings=settings).num_rows == 3
        chunks = list(bq_iter(table, chunk_rows=2, frame="arrow", settings=settings))
    finally:
        no_blocking_calls.activate()

    assert [chunk.num_rows for chunk in chunks] == [2, 1]
