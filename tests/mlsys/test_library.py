"""Whole tables to frames and back: `bq_get`, `bq_iter` and `bq_put` on real servers."""

from __future__ import annotations

import datetime as dt
import http.client
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pandas as pd
import polars as pl
import polars.testing
import pyarrow as pa
import pytest
from google.cloud.bigquery_storage_v1 import types

from mlsys import MlsysError, Settings, bq_get, bq_iter, bq_put, publish_model
from mlsys.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    TableMismatch,
    Unavailable,
)
from mlsys.frame import FrameKind, to_frame
from mlsys.local import DATASET, PROJECT, LocalServers
from mlsys.tables import BIGQUERY_TO_ARROW, standard_type
from tests.conftest import Client, Cloud
from tests.mlsys.models import SeesTheSame
from tests.mlsys.rest_server import Answer, Request, RestServer, rest_server
from tests.mlsys.storage_server import cutting_proxy
from tests.mlsys.test_frame_to_arrow import every_type
from tests.service.support import RefusedCall, RowsProxy, process_environment, rows_proxy

PATIENCE = 30
FRAMES = pytest.mark.parametrize("frame", ["pandas", "polars", "arrow"])
DISPOSITIONS = ["WRITE_APPEND", "WRITE_TRUNCATE", "WRITE_EMPTY"]


# The local server has no decimal that wide.
STORED = every_type().drop_columns(["BIGNUMERIC", "BIGNUMERIC_ARRAY"])


def numbers(rows: int, start: int = 0) -> pa.Table:
    return pa.table({"id": np.arange(start, start + rows)})


@pytest.fixture
def everything(cloud: Cloud) -> str:
    """A table with a column of each type."""
    return cloud.put(STORED.append_column("id", pa.array([0, 1, 2])))


def framed(table: pa.Table, frame: str) -> Any:
    return table if frame == "arrow" else to_frame(table, FrameKind(frame))


def assert_same_frame(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, pa.Table):
        assert actual.schema == expected.schema
        assert actual.equals(expected)
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(actual, expected)
    else:
        polars.testing.assert_frame_equal(actual, expected)


# Reading


@FRAMES
def test_a_table_is_read_with_every_value_and_the_dtypes_of_its_types(
    cloud: Cloud, settings: Settings, frame: str
) -> None:
    path = cloud.put(STORED)

    assert_same_frame(bq_get(path, frame, settings=settings), framed(STORED, frame))


@FRAMES
def test_a_query_gives_the_frame_that_its_table_gives(
    everything: str, settings: Settings, frame: str
) -> None:
    table = bq_get(everything, frame, settings=settings)

    query = bq_get(f"SELECT * FROM `{everything}` ORDER BY id", frame, settings=settings)

    assert_same_frame(query, table)


@FRAMES
def test_chunks_are_the_frame_in_pieces_dtype_for_dtype(
    everything: str, settings: Settings, frame: str
) -> None:
    whole = bq_get(everything, "arrow", settings=settings)

    chunks = list(bq_iter(everything, chunk_rows=2, frame=frame, settings=settings))

    assert [len(chunk) for chunk in chunks] == [2, 1]
    for chunk, start in zip(chunks, (0, 2), strict=True):
        assert_same_frame(chunk, framed(whole.slice(start, 2), frame))


@FRAMES
@pytest.mark.parametrize("query", [False, True])
def test_an_empty_result_keeps_its_columns_and_dtypes(
    cloud: Cloud, everything: str, settings: Settings, frame: str, query: bool
) -> None:
    what = f"SELECT * FROM `{everything}` WHERE FALSE"
    if not query:
        empty = cloud.new_table()
        cloud.query(f"CREATE TABLE `{empty}` AS {what}")
        what = empty

    nothing = bq_get(what, frame, settings=settings)

    full = bq_get(everything, "arrow", settings=settings)
    assert_same_frame(nothing, framed(full.slice(0, 0), frame))
    assert list(bq_iter(what, frame=frame, settings=settings)) == []


@pytest.mark.parametrize(
    ("chunk_rows", "sizes"),
    [(1000, [1000]), (500, [500, 500]), (999, [999, 1]), (5000, [1000]), (1, [1] * 1000)],
)
def test_chunks_have_the_rows_that_were_asked_for(
    cloud: Cloud, settings: Settings, chunk_rows: int, sizes: list[int]
) -> None:
    path = cloud.put(numbers(1000))

    chunks = list(bq_iter(path, chunk_rows=chunk_rows, settings=settings))

    assert [len(chunk) for chunk in chunks] == sizes
    assert pd.concat(chunks)["id"].tolist() == list(range(1000))


def test_rows_of_an_ordered_query_stay_in_order(cloud: Cloud, settings: Settings) -> None:
    path = cloud.put(numbers(25_000))
    query = f"SELECT id FROM `{path}` ORDER BY MOD(id, 7), id DESC"
    expected = sorted(range(25_000), key=lambda row: (row % 7, -row))

    assert bq_get(query, settings=settings)["id"].tolist() == expected
    chunks = bq_iter(query, chunk_rows=3000, settings=settings)
    assert pd.concat(chunks)["id"].tolist() == expected


def test_the_same_table_gives_the_same_rows_in_the_same_order_each_time(
    cloud: Cloud, settings: Settings
) -> None:
    path = cloud.put(numbers(300_000))
    many = settings.model_copy(update={"read_streams": 8})

    first, second = (bq_get(path, "arrow", settings=many) for _ in range(2))

    assert first.equals(second)
    assert sorted(first.column("id").to_pylist()) == list(range(300_000))


def test_a_view_is_read(cloud: Cloud, settings: Settings) -> None:
    path, view = cloud.put(numbers(10)), cloud.new_table("view")
    cloud.query(f"CREATE VIEW `{view}` AS SELECT id * 2 AS twice FROM `{path}`")

    assert sorted(bq_get(view, settings=settings)["twice"]) == list(range(0, 20, 2))
    [chunk] = bq_iter(view, settings=settings)
    assert len(chunk) == 10


def test_a_query_with_arrays_structs_and_nulls_is_read(settings: Settings) -> None:
    query = (
        "SELECT [1, 2] AS numbers, STRUCT('x' AS a, 1.5 AS b) AS pair, CAST(NULL AS NUMERIC) AS n"
    )

    [row] = bq_get(query, "arrow", settings=settings).to_pylist()

    assert row == {"numbers": [1, 2], "pair": {"a": "x", "b": 1.5}, "n": None}


def test_a_statement_without_a_result_gives_an_empty_frame(
    cloud: Cloud, settings: Settings
) -> None:
    path = cloud.new_table()

    made = bq_get(f"CREATE TABLE `{path}` AS SELECT 1 AS x", settings=settings)
    changed = bq_get(f"UPDATE `{path}` SET x = 2 WHERE TRUE", settings=settings)

    assert made.empty
    assert changed.empty
    assert cloud.rows(path) == [{"x": 2}]


def behind(servers: dict[str, str], settings: Settings) -> Settings:
    """Settings that lead through servers in between."""
    return settings.model_copy(update=servers)


def behind_rows(proxy: RowsProxy, settings: Settings, **changes: Any) -> Settings:
    return behind({"bigquery_storage_emulator_host": proxy.address} | changes, settings)


@contextmanager
def rest_in_between(settings: Settings, **changes: Any) -> Iterator[tuple[RestServer, Settings]]:
    """A server in front of BigQuery's REST API; `answer` may be wrapped."""
    target = urlsplit(settings.bigquery_emulator_host).netloc

    def forward(request: Request) -> Answer:
        with closing(http.client.HTTPConnection(target)) as connection:
            path = f"{request.path}?{request.query}"
            headers = {"Content-Type": "application/json"}
            connection.request(request.method, path, request.body, headers)
            response = connection.getresponse()
            return response.status, response.read()

    with rest_server() as server:
        server.answer = forward
        yield server, behind({"bigquery_emulator_host": server.url} | changes, settings)


@pytest.mark.parametrize(("order", "streams"), [("", 6), (" ORDER BY id", 1), ("\norder  by 1", 1)])
def test_a_querys_result_is_streamed_where_the_server_keeps_it_in_a_table(
    cloud: Cloud, settings: Settings, order: str, streams: int
) -> None:
    result = cloud.put(numbers(5))
    project, dataset, table = result.split(".")
    kept = {"projectId": project, "datasetId": dataset, "tableId": table}
    with (
        rows_proxy(settings.bigquery_storage_emulator_host) as rows,
        rest_in_between(settings) as (rest, own),
    ):
        forward = rest.answer

        def with_the_result_in_a_table(request: Request) -> Answer:
            status, body = forward(request)
            told = json.loads(body or b"{}")
            if "query" in told.get("configuration", {}):
                told["configuration"]["query"]["destinationTable"] = kept
            return status, told

        rest.answer = with_the_result_in_a_table
        own = behind_rows(rows, own, read_streams=6)
        frame = bq_get(f"SELECT 7 AS id{order}", settings=own)

    assert frame["id"].tolist() == list(range(5))
    [asked] = rows.messages("CreateReadSession")
    assert types.CreateReadSessionRequest.deserialize(asked).max_stream_count == streams


# What may be asked wrongly


@pytest.mark.parametrize(
    ("what", "error", "told"),
    [
        ("nowhere", InvalidRequest, "'nowhere' is not a table path"),
        ("a.b.c.d", InvalidRequest, "project.dataset.table"),
        (f"{PROJECT}.{DATASET}.nope", NotFound, f"{PROJECT}.{DATASET}.nope does not exist"),
        (f"{PROJECT}.nope.x", NotFound, f"{PROJECT}.nope.x does not exist"),
        (f"SELECT * FROM `{PROJECT}.{DATASET}.nope`", NotFound, f"{DATASET}.nope"),
        (f"SELECT * FROM `{PROJECT}.nope.x`", NotFound, "nope"),
        ("SELECT nope FROM (SELECT 1 AS x)", InvalidRequest, "nope"),
        ("SELEKT everything", InvalidRequest, "The query was refused"),
    ],
)
def test_a_read_that_can_not_be_tells_what_to_mend(
    settings: Settings, what: str, error: type[MlsysError], told: str
) -> None:
    with pytest.raises(error) as whole:
        bq_get(what, settings=settings)
    with pytest.raises(error) as chunks:
        list(bq_iter(what, settings=settings))

    assert told in str(whole.value)
    assert str(chunks.value) == str(whole.value)


def test_a_misspelt_choice_is_told_before_anything_is_opened() -> None:
    nobody = Settings(_env_file=None, bigquery_emulator_host="http://127.0.0.1:9")
    path = f"{PROJECT}.{DATASET}.x"

    with pytest.raises(InvalidRequest, match=r"frame is 'panda'\. Use one of pandas, pol"):
        bq_get(path, "panda", settings=nobody)
    with pytest.raises(InvalidRequest, match="frame is 'panda'"):
        bq_iter(path, frame="panda", settings=nobody)
    with pytest.raises(InvalidRequest, match="chunk_rows is 0"):
        bq_iter(path, chunk_rows=0, settings=nobody)
    with pytest.raises(InvalidRequest, match=r"'WRITE_TRUNCATED'\. Use one of WRITE_AP"):
        bq_put(numbers(1), path, "WRITE_TRUNCATED", settings=nobody)
    with pytest.raises(InvalidRequest, match="is not a table path"):
        bq_put(numbers(1), "somewhere", settings=nobody)
    with pytest.raises(InvalidRequest, match="Column 'x'"):
        bq_put(pd.DataFrame({"x": [1, "a"]}), path, settings=nobody)


def test_without_an_answer_it_says_so(settings: Settings) -> None:
    with rest_server() as rest:
        rest.answer = lambda _: (503, {"error": {"code": 503, "message": "down"}})
        own = behind({"bigquery_emulator_host": rest.url, "retry_seconds": 0.01}, settings)
        path = f"{PROJECT}.{DATASET}.x"

        with pytest.raises(Unavailable, match="can't be reached just now"):
            bq_get(path, settings=own)
        with pytest.raises(Unavailable, match="can't be reached just now"):
            bq_put(numbers(1), path, settings=own)


# Reads that end early


def started_since(before: list[threading.Thread]) -> list[threading.Thread]:
    """The threads that go on, of those that were not there before."""
    new = [thread for thread in threading.enumerate() if thread not in before]
    for thread in new:
        thread.join(PATIENCE)
    return [thread for thread in new if thread.is_alive()]


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert started_since(before) == []


@pytest.fixture(scope="module")
def large(cloud: Cloud) -> str:
    """A table of several read streams, each of several messages."""
    path = cloud.new_table("large")
    cloud.query(
        f"CREATE TABLE `{path}` AS SELECT id, RAND() AS x, RAND() AS y "
        "FROM UNNEST(GENERATE_ARRAY(1, 600000)) AS id"
    )
    return path


def test_a_loop_that_is_left_early_ends_the_read(large: str, settings: Settings) -> None:
    before = threading.enumerate()

    for chunk in bq_iter(large, chunk_rows=1000, settings=settings):
        assert len(chunk) == 1000
        break

    assert started_since(before) == []


@pytest.mark.usefixtures("no_thread_is_left")
def test_an_exception_in_the_loops_body_comes_out_as_itself(large: str, settings: Settings) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        for _ in bq_iter(large, chunk_rows=1000, settings=settings):
            raise ZeroDivisionError("mine")

    assert raised.value.args == ("mine",)
    assert raised.value.__context__ is None


@pytest.mark.usefixtures("no_thread_is_left")
def test_an_exception_that_is_thrown_into_the_chunks_comes_out_as_itself(
    large: str, settings: Settings
) -> None:
    chunks = bq_iter(large, chunk_rows=1000, settings=settings)
    next(chunks)

    with pytest.raises(ZeroDivisionError):
        chunks.throw(ZeroDivisionError("mine"))


@pytest.mark.usefixtures("no_thread_is_left")
def test_chunks_that_are_never_asked_for_open_nothing(large: str, settings: Settings) -> None:
    before = threading.enumerate()

    chunks = bq_iter(large, settings=settings)

    assert threading.enumerate() == before
    chunks.close()


@pytest.mark.usefixtures("no_thread_is_left")
def test_two_reads_and_a_write_may_go_on_at_once(
    cloud: Cloud, large: str, settings: Settings
) -> None:
    doubled = cloud.new_table("doubled")
    other = bq_iter(large, chunk_rows=50_000, settings=settings)

    for chunk in bq_iter(large, chunk_rows=200_000, frame="polars", settings=settings):
        bq_put(chunk.select(pl.col("id") * 2), doubled, settings=settings)
        assert len(next(other)) == 50_000
    other.close()

    [row] = cloud.query(f"SELECT COUNT(*) AS n, SUM(id) AS total FROM `{doubled}`")
    assert dict(row) == {"n": 600_000, "total": 600_000 * 600_001}


@pytest.mark.usefixtures("no_thread_is_left")
def test_a_read_that_breaks_raises_before_its_last_rows_are_taken_for_the_end(
    cloud: Cloud, settings: Settings
) -> None:
    path = cloud.put(numbers(100_000))
    answers = itertools.count()

    def only_the_first(answer: bytes) -> bytes:
        if next(answers):
            raise RefusedCall(grpc.StatusCode.PERMISSION_DENIED, "no longer")
        return answer

    with rows_proxy(settings.bigquery_storage_emulator_host) as proxy:
        proxy.after["ReadRows"] = only_the_first
        seen: list[int] = []
        chunks = bq_iter(path, chunk_rows=10_000, settings=behind_rows(proxy, settings))
        with pytest.raises(MlsysError, match="is not open to these credentials"):
            seen.extend(len(chunk) for chunk in chunks)

    assert set(seen) <= {10_000}


def interrupt() -> None:
    # Of all threads it is the main one that has to wake up.
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@contextmanager
def interrupted_at(proxy: RowsProxy, method: str) -> Iterator[None]:
    """Presses Ctrl-C when a call arrives, which is answered when the block is over."""
    over, calls = threading.Event(), itertools.count()

    def hold() -> None:
        if next(calls) == 0:
            interrupt()
        over.wait(PATIENCE)

    proxy.before[method] = hold
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        over.set()


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("method", ["CreateReadSession", "ReadRows"])
def test_ctrl_c_ends_a_read_at_once(large: str, settings: Settings, method: str) -> None:
    for read in (bq_get, lambda *args, **more: list(bq_iter(*args, **more))):
        with rows_proxy(settings.bigquery_storage_emulator_host) as proxy:
            own = behind_rows(proxy, settings)
            with interrupted_at(proxy, method):
                read(large, settings=own)


@contextmanager
def interrupted_at_the_query(rest: RestServer) -> Iterator[None]:
    """Presses Ctrl-C when a query's result is asked for, and keeps the query running."""
    over, calls = threading.Event(), itertools.count()
    forward = rest.answer

    def hold_the_result(request: Request) -> Answer:
        if request.path.endswith("/cancel"):
            job = forward(Request("GET", request.path.removesuffix("/cancel"), "", b""))[1]
            return 200, {"job": json.loads(job)}
        if request.method == "GET" and "/queries/" in request.path:
            if next(calls) == 0:
                interrupt()
            over.wait(PATIENCE)
        return forward(request)

    def still_running(request: Request) -> Answer:
        status, body = hold_the_result(request)
        if request.method == "POST" and request.path.endswith("/jobs"):
            told = json.loads(body)
            told["status"] = {"state": "RUNNING"}
            return status, told
        return status, body

    rest.answer = still_running
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        over.set()
    assert [r.path for r in rest.requests if r.path.endswith("/cancel")]


def test_ctrl_c_cancels_the_query(settings: Settings) -> None:
    with rest_in_between(settings) as (rest, own), interrupted_at_the_query(rest):
        bq_get("SELECT 1 AS x", settings=own)


# Writing


@FRAMES
def test_what_is_written_is_read_again_dtype_for_dtype(
    cloud: Cloud, settings: Settings, frame: str
) -> None:
    table = STORED
    data, path = framed(table, frame), cloud.new_table()

    bq_put(data, path, settings=settings)

    assert_same_frame(bq_get(path, frame, settings=settings), data)


def test_a_table_is_made_with_bigquerys_types(cloud: Cloud, settings: Settings) -> None:
    path = cloud.new_table()

    bq_put(STORED, path, settings=settings)

    columns = {c.name: c for c in cloud.clients.bigquery.get_table(path).schema}
    for name in BIGQUERY_TO_ARROW.keys() - {"BIGNUMERIC"}:
        assert standard_type(columns[name]) == name
        assert columns[name].mode == "NULLABLE"
        assert standard_type(columns[f"{name}_ARRAY"]) == f"ARRAY<{name}>"


@FRAMES
def test_rows_are_added_replaced_or_refused_as_was_asked(
    cloud: Cloud, settings: Settings, frame: str
) -> None:
    path = cloud.new_table()
    one, two = framed(numbers(1), frame), framed(numbers(2, start=10), frame)

    def ids() -> list[int]:
        return sorted(row["id"] for row in cloud.rows(path))

    bq_put(one, path, "WRITE_EMPTY", settings=settings)
    assert ids() == [0]
    with pytest.raises(Conflict, match="has rows already"):
        bq_put(two, path, "WRITE_EMPTY", settings=settings)
    assert ids() == [0]
    bq_put(two, path, settings=settings)
    assert ids() == [0, 10, 11]
    bq_put(two, path, "WRITE_TRUNCATE", settings=settings)
    assert ids() == [10, 11]
    bq_put(two[:0], path, "WRITE_TRUNCATE", settings=settings)
    assert ids() == []
    bq_put(one, path, "WRITE_EMPTY", settings=settings)
    assert ids() == [0]


@pytest.mark.parametrize("disposition", DISPOSITIONS)
def test_the_table_is_made_if_missing_even_without_rows(
    cloud: Cloud, settings: Settings, disposition: str
) -> None:
    path, empty = cloud.new_table(), cloud.new_table()

    bq_put(numbers(3), path, disposition, settings=settings)
    bq_put(numbers(0), empty, disposition, settings=settings)

    assert cloud.count(path) == 3
    assert cloud.count(empty) == 0
    assert list(cloud.columns(empty)) == ["id"]
    assert staging_of(cloud, path) == staging_of(cloud, empty) == []


def test_a_table_may_be_replaced_by_one_with_other_columns(
    cloud: Cloud, settings: Settings
) -> None:
    path = cloud.put(numbers(3))

    bq_put(pd.DataFrame({"name": ["a"], "id": ["b"]}), path, "WRITE_TRUNCATE", settings=settings)

    assert cloud.rows(path) == [{"name": "a", "id": "b"}]


@pytest.mark.parametrize("disposition", DISPOSITIONS)
def test_a_dataset_that_does_not_exist_is_told(settings: Settings, disposition: str) -> None:
    with pytest.raises(NotFound, match=f"dataset {PROJECT}.nope does not exist"):
        bq_put(numbers(1), f"{PROJECT}.nope.x", disposition, settings=settings)


@pytest.mark.parametrize("disposition", DISPOSITIONS)
def test_a_view_is_not_written_to(cloud: Cloud, settings: Settings, disposition: str) -> None:
    view = cloud.new_table("view")
    cloud.query(f"CREATE VIEW `{view}` AS SELECT 1 AS id")

    with pytest.raises(InvalidRequest, match="is a view"):
        bq_put(numbers(1), view, disposition, settings=settings)


MADE = """
    CREATE TABLE `{table}` (
        a INT64, b FLOAT64, c NUMERIC, d DATE, e TIMESTAMP, f BOOL, g STRING, h ARRAY<INT64>
    )
"""


@pytest.fixture
def made(cloud: Cloud) -> str:
    """An empty table with columns of some types."""
    path = cloud.new_table()
    cloud.query(MADE.format(table=path))
    return path


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (pd.DataFrame({"B": [1], "A": [2]}), {"a": 2, "b": 1.0}),
        (pd.DataFrame({"a": [1.0, None]}), {"a": 1}),
        (pd.DataFrame({"c": [1]}), {"c": Decimal(1)}),
        (pd.DataFrame({"c": [1.5]}), {"c": Decimal("1.5")}),
        (pd.DataFrame({"c": [Decimal("1.5")], "b": [1]}), {"c": Decimal("1.5"), "b": 1.0}),
        (pd.DataFrame({"d": pd.to_datetime(["2020-06-01"])}), {"d": dt.date(2020, 6, 1)}),
        (
            pd.DataFrame({"e": pd.to_datetime(["2020-06-01"])}),
            {"e": dt.datetime(2020, 6, 1, tzinfo=dt.UTC)},
        ),
        (
            pd.DataFrame({name: pd.Series([None], dtype=object) for name in "abcdefg"}),
            {},
        ),
        (pd.DataFrame({"h": pd.Series([None], dtype=object)}), {}),
        (pd.DataFrame({"h": [[1.0, 2.0]]}), {"h": [1, 2]}),
    ],
    ids=lambda each: "" if isinstance(each, pd.DataFrame) else ",".join(each),
)
def test_a_frame_is_fitted_to_a_table_where_that_loses_nothing(
    cloud: Cloud, settings: Settings, made: str, frame: pd.DataFrame, expected: dict[str, Any]
) -> None:
    bq_put(frame, made, settings=settings)

    row = cloud.rows(made, order_by="a DESC NULLS LAST")[0]
    assert row == dict.fromkeys("abcdefg") | {"h": []} | expected
    assert cloud.count(made) == len(frame)


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (pd.DataFrame({"a": [1.5]}), "a is INT64, not double"),
        (pd.DataFrame({"a": ["x"]}), "a is INT64, not string"),
        (pd.DataFrame({"b": [2**53 + 1]}), "b is FLOAT64, not int64"),
        (pd.DataFrame({"d": [1]}), "d is DATE, not int64"),
        (pd.DataFrame({"d": pd.to_datetime(["2020-06-01 12:00"])}), "d is DATE, not timestamp"),
        (pd.DataFrame({"e": [1]}), "e is TIMESTAMP, not int64"),
        (pd.DataFrame({"f": [5]}), "f is BOOL, not int64"),
        (pd.DataFrame({"f": [0.5]}), "f is BOOL, not double"),
        (pd.DataFrame({"h": [1]}), "h is ARRAY<INT64>, not int64"),
        (pd.DataFrame({"a": [[1]]}), "a is INT64, not list"),
        (pd.DataFrame({"z": [1]}), "it has no column z"),
        (pd.DataFrame({"a": ["x"], "y": [1], "z": [1]}), "a is INT64, not string, it has no col"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_frame_that_does_not_fit_the_table_is_refused_and_all_of_it_is_told(
    cloud: Cloud, settings: Settings, made: str, frame: pd.DataFrame, told: str
) -> None:
    for disposition in ("WRITE_APPEND", "WRITE_EMPTY"):
        with pytest.raises(TableMismatch) as refused:
            bq_put(frame, made, disposition, settings=settings)

        assert told in str(refused.value)
    assert cloud.count(made) == 0


def test_ctrl_c_cancels_the_statement_that_replaces_a_table(
    cloud: Cloud, settings: Settings
) -> None:
    path = cloud.put(numbers(3))
    with rest_in_between(settings) as (rest, own), interrupted_at_the_query(rest):
        bq_put(numbers(10), path, "WRITE_TRUNCATE", settings=own)

    assert staged(cloud, path) == []


def test_a_replacement_that_is_not_confirmed_is_told_as_that(
    cloud: Cloud, settings: Settings
) -> None:
    path = cloud.put(numbers(3))
    with rest_in_between(settings, retry_seconds=1) as (rest, own):
        forward = rest.answer

        def refuse_queries(request: Request) -> Answer:
            if request.method == "POST" and request.path.endswith("/jobs"):
                return 503, {}
            return forward(request)

        rest.answer = refuse_queries
        with pytest.raises(Unavailable, match=f"did not confirm that {path} has the new rows"):
            bq_put(numbers(10), path, "WRITE_TRUNCATE", settings=own)

    assert cloud.count(path) == 3
    assert staged(cloud, path) == []


def staged(cloud: Cloud, path: str) -> list[str]:
    """The tables beside this one that its replacement has left."""
    dataset, _, name = path.rpartition(".")
    tables = [found.table_id for found in cloud.clients.bigquery.list_tables(dataset)]
    return [found for found in tables if name in found and found != name]


def test_a_value_that_the_table_requires_is_told(cloud: Cloud, settings: Settings) -> None:
    path = cloud.new_table()
    cloud.query(f"CREATE TABLE `{path}` (id INT64 NOT NULL, note STRING)")

    with pytest.raises(TableMismatch, match="it requires a value of id"):
        bq_put(pd.DataFrame({"note": ["a"]}), path, settings=settings)
    with pytest.raises(TableMismatch, match="it requires a value of id"):
        bq_put(pd.DataFrame({"id": pd.array([1, None], "Int64")}), path, settings=settings)
    bq_put(pd.DataFrame({"id": [1]}), path, settings=settings)

    assert cloud.rows(path) == [{"id": 1, "note": None}]


# All or nothing


def staging_of(cloud: Cloud, path: str) -> list[str]:
    tables = cloud.clients.bigquery.list_tables(f"{PROJECT}.{DATASET}")
    prefix = f"{path.rpartition('.')[2]}_staging_"
    return [table.table_id for table in tables if table.table_id.startswith(prefix)]


@pytest.fixture(params=["WRITE_APPEND", "WRITE_TRUNCATE"])
def disposition(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def untouched(cloud: Cloud) -> Iterator[str]:
    """A table of three rows that has to have them afterwards, and nothing beside it."""
    path = cloud.put(numbers(3))
    yield path
    assert cloud.rows(path, order_by="id") == [{"id": 0}, {"id": 1}, {"id": 2}]
    assert staging_of(cloud, path) == []


@pytest.mark.parametrize("method", ["AppendRows", "FinalizeWriteStream"])
@pytest.mark.usefixtures("no_thread_is_left")
def test_ctrl_c_ends_a_write_and_leaves_the_table_as_it_was(
    settings: Settings, untouched: str, disposition: str, method: str
) -> None:
    with rows_proxy(settings.bigquery_storage_emulator_host) as proxy:
        own = behind_rows(proxy, settings)
        with interrupted_at(proxy, method):
            bq_put(numbers(200_000), untouched, disposition, settings=own)


@pytest.mark.usefixtures("no_thread_is_left")
def test_a_write_whose_connection_is_lost_for_good_leaves_the_table_as_it_was(
    cloud: Cloud, settings: Settings, untouched: str, disposition: str
) -> None:
    # Fewer bytes than one request, so that no attempt gets further than the one before.
    cuts = [500_000] * 1000
    target = settings.bigquery_storage_emulator_host
    between = cutting_proxy(target, cuts, towards_server=True)
    with cloud.portal.wrap_async_context_manager(between) as proxy:
        own = behind_rows(proxy, settings, retry_seconds=0.2)
        with pytest.raises(Unavailable, match="Nothing was written"):
            bq_put(numbers(200_000), untouched, disposition, settings=own)

    assert proxy.dropped > 0


def test_a_read_heeds_the_settings_of_streams(cloud: Cloud, settings: Settings) -> None:
    path, calls = cloud.put(numbers(3)), itertools.count()
    let_go, waited_for = threading.Event(), threading.Event()

    def say_nothing_at_first() -> None:
        if next(calls) == 0 and not let_go.wait(PATIENCE):
            waited_for.set()

    with rows_proxy(settings.bigquery_storage_emulator_host) as proxy:
        proxy.before["ReadRows"] = say_nothing_at_first
        own = behind_rows(proxy, settings, silence_seconds=0.2, read_compression="zstd")
        try:
            assert len(bq_get(path, settings=own)) == 3
        finally:
            let_go.set()

    assert not waited_for.is_set()
    [asked] = proxy.messages("CreateReadSession")
    options = types.CreateReadSessionRequest.pb().FromString(asked).read_session.read_options
    codec = options.arrow_serialization_options.buffer_compression
    assert codec == types.ArrowSerializationOptions.CompressionCodec.ZSTD


KILLED = """
import numpy as np, pyarrow as pa, sys
from mlsys import bq_put
bq_put(pa.table({"id": np.arange(2_000_000)}), *sys.argv[1:])
"""


def test_a_process_that_is_killed_while_it_writes_leaves_the_table_as_it_was(
    servers: LocalServers, cloud: Cloud, disposition: str
) -> None:
    path = cloud.put(numbers(3))
    under_way = threading.Event()
    answers = itertools.count()

    def note(answer: bytes) -> bytes:
        if next(answers):
            under_way.set()
            over.wait(PATIENCE)
        return answer

    over = threading.Event()
    with rows_proxy(servers.bigquery_storage) as proxy:
        proxy.after["AppendRows"] = note
        env = servers.env | {"BIGQUERY_STORAGE_EMULATOR_HOST": proxy.address}
        command = [sys.executable, "-c", KILLED, path, disposition]
        with subprocess.Popen(command, env=process_environment(**env)) as process:
            assert under_way.wait(PATIENCE)
            process.kill()
        over.set()

    assert process.returncode == -signal.SIGKILL
    assert cloud.count(path) == 3
    left = staging_of(cloud, path)
    assert len(left) == (disposition == "WRITE_TRUNCATE")
    for name in left:
        cloud.clients.bigquery.delete_table(f"{PROJECT}.{DATASET}.{name}")


def test_a_replacement_that_bigquery_refuses_leaves_the_table_as_it_was(
    settings: Settings, untouched: str
) -> None:
    with rest_in_between(settings) as (rest, own):
        forward = rest.answer

        def refuse_to_replace(request: Request) -> Answer:
            if b"CREATE OR REPLACE" in request.body:
                error = {"code": 400, "message": "not today", "errors": [{"reason": "invalid"}]}
                return 400, {"error": error}
            return forward(request)

        rest.answer = refuse_to_replace
        with pytest.raises(InvalidRequest, match="not today"):
            bq_put(numbers(5), untouched, "WRITE_TRUNCATE", settings=own)

    # Were this process killed, its staging table would go by itself.
    [made] = [r.body for r in rest.requests if r.method == "POST" and r.path.endswith("/tables")]
    expires = dt.datetime.fromtimestamp(int(json.loads(made)["expirationTime"]) / 1000, dt.UTC)
    assert expires < dt.datetime.now(dt.UTC) + dt.timedelta(days=2)


def test_a_staging_table_that_can_not_be_deleted_hides_no_error(
    cloud: Cloud, settings: Settings
) -> None:
    path = cloud.put(numbers(3))
    with rest_in_between(settings) as (rest, own):
        forward = rest.answer

        def refuse(request: Request) -> Answer:
            if b"CREATE OR REPLACE" in request.body or request.method == "DELETE":
                said = "not today" if request.body else "not now"
                error = {"code": 403, "message": said, "errors": [{"reason": "accessDenied"}]}
                return 403, {"error": error}
            return forward(request)

        rest.answer = refuse
        with pytest.raises(MlsysError, match="is not open to these credentials") as raised:
            bq_put(numbers(5), path, "WRITE_TRUNCATE", settings=own)

    assert "not today" in str(raised.value.__cause__)


def test_a_table_in_use_is_never_seen_half_replaced(cloud: Cloud, settings: Settings) -> None:
    rows = 100_000
    path = cloud.put(pa.table({"id": np.arange(rows), "turn": np.zeros(rows, int)}))
    over = threading.Event()

    def look() -> set[tuple[int, int, int]]:
        seen = set()
        while not over.is_set():
            frame = bq_get(path, "polars", settings=settings)
            seen.add((len(frame), frame["turn"].n_unique(), frame["id"].n_unique()))
            [row] = bq_get(
                f"SELECT COUNT(*), COUNT(DISTINCT turn), COUNT(DISTINCT id) FROM `{path}`",
                "polars",
                settings=settings,
            ).rows()
            seen.add(row)
        return seen

    with ThreadPoolExecutor(2) as threads:
        looks = [threads.submit(look) for _ in range(2)]
        try:
            for turn in range(1, 6):
                data = pa.table({"id": np.arange(rows), "turn": np.full(rows, turn)})
                bq_put(data, path, "WRITE_TRUNCATE", settings=settings)
        finally:
            over.set()

    assert set().union(*(each.result() for each in looks)) == {(rows, 1, rows)}


def at_once(*calls: Callable[[], Any]) -> list[Exception | None]:
    """What each call raised, if anything."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Exception | None:
        barrier.wait(PATIENCE)
        try:
            call()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))


def put_by(settings: Settings, path: str, disposition: str, who: int) -> Callable[[], None]:
    data = pa.table({"who": np.full(1000, who)})
    return lambda: bq_put(data, path, disposition, settings=settings)


def test_of_several_who_write_only_if_empty_one_does(cloud: Cloud, settings: Settings) -> None:
    path = cloud.new_table()

    raised = at_once(*(put_by(settings, path, "WRITE_EMPTY", who) for who in range(4)))

    assert sorted(type(each).__name__ for each in raised) == ["Conflict"] * 3 + ["NoneType"]
    [row] = cloud.query(f"SELECT COUNT(*) AS n, COUNT(DISTINCT who) AS who FROM `{path}`")
    assert dict(row) == {"n": 1000, "who": 1}


def test_of_several_who_replace_a_table_one_is_the_last(cloud: Cloud, settings: Settings) -> None:
    path = cloud.new_table()

    raised = at_once(*(put_by(settings, path, "WRITE_TRUNCATE", who) for who in range(3)))

    assert raised == [None] * 3
    [row] = cloud.query(f"SELECT COUNT(*) AS n, COUNT(DISTINCT who) AS who FROM `{path}`")
    assert dict(row) == {"n": 1000, "who": 1}
    assert staging_of(cloud, path) == []


def test_all_who_append_to_a_new_table_do(cloud: Cloud, settings: Settings) -> None:
    path = cloud.new_table()

    raised = at_once(*(put_by(settings, path, "WRITE_APPEND", who) for who in range(4)))

    assert raised == [None] * 4
    [row] = cloud.query(f"SELECT COUNT(*) AS n, COUNT(DISTINCT who) AS who FROM `{path}`")
    assert dict(row) == {"n": 4000, "who": 4}


def test_rows_that_are_not_counted_yet_are_rows(cloud: Cloud, settings: Settings) -> None:
    path = cloud.put(numbers(3))
    with rest_in_between(settings) as (rest, own):
        forward = rest.answer

        def uncounted(request: Request) -> Answer:
            status, body = forward(request)
            told = json.loads(body or b"{}")
            if "numRows" in told:
                told["numRows"] = "0"
            return status, told

        rest.answer = uncounted
        with pytest.raises(Conflict, match="has rows already"):
            bq_put(numbers(1), path, "WRITE_EMPTY", settings=own)

    assert cloud.count(path) == 3


# The same everywhere


@pytest.mark.parametrize("kind", [FrameKind.PANDAS, FrameKind.POLARS])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_the_service_gives_a_model_the_frame_that_bq_get_gave_it(
    service: Client, cloud: Cloud, settings: Settings, kind: FrameKind, chunk_rows: int
) -> None:
    # Some chunks have nulls only, some have none.
    order = [0, 0, 0, 2, 2, 1, 1, 1, 1, 0, 1, 2] * 10
    table = STORED
    table = table.take(order).append_column("id", pa.array(range(len(order))))
    path, output = cloud.put(table), cloud.new_table("scored")
    rows = bq_get(path, kind, settings=settings)
    features = rows.drop(columns="id") if kind is FrameKind.PANDAS else rows.drop("id")
    model = SeesTheSame().fit(features)
    name = cloud.name("model").replace("_", "-")
    publish_model(model, name, rows=rows, id_columns="id", target="told", settings=settings)

    response = service.predict(path, output, name, chunk_rows=chunk_rows)

    assert response.status_code == 200, response.text
    told = {row["id"]: row["told"] for row in cloud.rows(output)}
    assert told == dict(zip(rows["id"].to_list(), model.predict(features).tolist(), strict=True))


# What a data scientist does in a day, and what came of it.
EVERY_HELPER = """
import json, warnings
warnings.simplefilter("error")
import mlsys

def every_helper(table, query, name):
    import numpy as np
    from sklearn.linear_model import LinearRegression
    bucket, path = "mlsys-models-dev", f"{name}/notes"
    told = {}
    mlsys.bq_put(mlsys.bq_get(table), f"{table}_{name}")
    pandas, polars, arrow = (
        mlsys.bq_get(f"{table}_{name}", frame) for frame in ("pandas", "polars", "arrow")
    )
    told["pandas"] = [str(pandas.dtypes.to_dict()), str(pandas.to_dict("list"))]
    told["polars"] = [str(polars.schema), str(polars.to_dict(as_series=False))]
    told["arrow"] = [str(arrow.schema), str(arrow.to_pydict())]
    told["query"] = str(mlsys.bq_get(query).to_dict("list"))
    told["chunks"] = [len(chunk) for chunk in mlsys.bq_iter(table, chunk_rows=4)]
    mlsys.gcs_put("Größe", bucket, f"{path}.txt")
    told["text"] = mlsys.gcs_get(bucket, f"{path}.txt").decode()
    mlsys.gcs_put_pickle({"a": np.arange(3)}, bucket, f"{path}.pkl")
    told["pickle"] = str(mlsys.gcs_get_pickle(bucket, f"{path}.pkl"))
    told["listed"] = [blob.rpartition("/")[2] for blob in mlsys.gcs_list_blobs(bucket, path)]
    rows = mlsys.bq_get(table)[["id"]].astype(float)
    published = mlsys.publish_model(LinearRegression().fit(rows, rows["id"]), name, rows=rows)
    told["version"] = published.version
    mlsys.bq_put(rows, f"{table}_{name}", "WRITE_TRUNCATE")
    told["replaced"] = str(mlsys.bq_get(f"{table}_{name}").dtypes.to_dict())
    try:
        mlsys.bq_get(f"{table}_nope")
    except mlsys.MlsysError as error:
        told["error"] = f"{type(error).__name__}: {error}"
    return json.dumps(told)
"""
IN_A_SCRIPT = """
print(every_helper({table!r}, {query!r}, "in-a-script"))
"""
IN_A_RUNNING_LOOP = """
import asyncio

async def main():
    return every_helper({table!r}, {query!r}, "in-a-running-loop")

print(asyncio.run(main()))
"""
IN_A_KERNEL = """
import asyncio
assert asyncio.get_event_loop().is_running()
print(every_helper({table!r}, {query!r}, "in-a-kernel"))
"""
# Runs its input in a real kernel and passes on what that prints.
KERNEL = """
import subprocess, sys
from jupyter_client.manager import start_new_kernel

# What the kernel itself has to say of its sockets is none of our business.
manager, client = start_new_kernel(kernel_name="python3", stderr=subprocess.DEVNULL)

def pass_on(message):
    content = message["content"]
    match message["msg_type"]:
        case "stream":
            print(content["text"], end="", file=getattr(sys, content["name"]))
        case "error":
            print(*content["traceback"], sep="\\n", file=sys.stderr)
        case "display_data":
            print("displayed", content["data"], file=sys.stderr)

try:
    client.execute_interactive(sys.stdin.read(), output_hook=pass_on, timeout=100)
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def test_every_helper_does_the_same_in_a_script_in_a_running_loop_and_in_a_notebook(
    servers: LocalServers, cloud: Cloud
) -> None:
    table = cloud.put(STORED.append_column("id", pa.array([0, 1, 2])))
    query = f"SELECT id, STRING FROM `{table}` ORDER BY id DESC"
    env = process_environment(**servers.env)

    def told(how: str) -> dict[str, Any]:
        code = EVERY_HELPER + how.format(table=table, query=query)
        driver = KERNEL if how == IN_A_KERNEL else "import sys; exec(sys.stdin.read())"
        command = [sys.executable, "-c", driver]
        done = subprocess.run(command, input=code, env=env, capture_output=True, text=True)
        # Nothing is written where nobody looks, and nothing displayed where nobody waits.
        assert done.stderr == ""
        return json.loads(done.stdout)

    with ThreadPoolExecutor(3) as threads:
        script, loop, kernel = threads.map(told, (IN_A_SCRIPT, IN_A_RUNNING_LOOP, IN_A_KERNEL))

    assert loop == script
    assert kernel == script
    assert script["text"] == "Größe"
    assert script["listed"] == ["notes.pkl", "notes.txt"]
    assert script["chunks"] == [3]
    assert script["version"] == "v1"
    assert (
        script["error"] == f"NotFound: The table {table}_nope does not exist. Check its full path."
    )


# Without credentials there is nothing to be had, and each helper says so.
WITHOUT_CREDENTIALS = """
import mlsys
from sklearn.dummy import DummyRegressor
import pandas as pd

rows = pd.DataFrame({"x": [1.0]})
model = DummyRegressor().fit(rows, [1.0])
settings = mlsys.Settings(_env_file=None, gcp_project_id="my-project")
for call in (
    lambda: mlsys.bq_get("my-project.d.t", settings=settings),
    lambda: next(mlsys.bq_iter("SELECT 1 AS x", settings=settings)),
    lambda: mlsys.bq_put(rows, "my-project.d.t", settings=settings),
    lambda: mlsys.gcs_get("b", "p", settings=settings),
    lambda: mlsys.gcs_put("x", "b", "p", settings=settings),
    lambda: mlsys.gcs_get_pickle("b", "p", settings=settings),
    lambda: mlsys.gcs_put_pickle("x", "b", "p", settings=settings),
    lambda: mlsys.gcs_list_blobs("b", settings=settings),
    lambda: mlsys.publish_model(model, "m", rows=rows, settings=settings),
):
    try:
        print("no error:", call())
    except mlsys.MlsysError as error:
        print(type(error).__name__, error)
"""


def test_without_credentials_every_helper_tells_how_to_get_some(tmp_path: Path) -> None:
    # Nobody is asked whether this is a machine of Google's.
    env = process_environment(NO_GCE_CHECK="true", CLOUDSDK_CONFIG=str(tmp_path))

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_CREDENTIALS],
        env=env,
        capture_output=True,
        text=True,
    )

    assert done.stderr == ""
    said = done.stdout.splitlines()
    assert len(said) == 9
    for line in said:
        assert line.startswith("AccessDenied Google Cloud: no usable credentials.")
        assert "gcloud auth application-default login" in line


PEAK = """
import resource, sys
from mlsys import bq_iter
rows = sum(len(chunk) for chunk in bq_iter(sys.argv[1], chunk_rows=50_000))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_stays_flat_however_many_rows_there_are(servers: LocalServers, cloud: Cloud) -> None:
    # As Arrow 16 MB, and ten times as much.
    columns = ", ".join(f"MOD(id, 97) / {n}.0 AS x{n}" for n in range(1, 10))
    peaks = []
    for rows in (200_000, 2_000_000):
        table = cloud.new_table("rows")
        cloud.query(
            f"CREATE TABLE `{table}` AS SELECT id, {columns} "
            f"FROM UNNEST(GENERATE_ARRAY(1, {rows})) AS id"
        )
        done = subprocess.run(
            [sys.executable, "-c", PEAK, table],
            # The local server's messages are as large as 65,536 rows are.
            env=process_environment(**servers.env, READ_STREAMS="2"),
            capture_output=True,
            text=True,
            check=True,
        )
        count, peak = map(int, done.stdout.split())
        assert count == rows
        peaks.append(peak)
        cloud.clients.bigquery.delete_table(table)

    small, large = peaks
    assert large - small < 48


def test_a_model_that_saw_other_dtypes_would_not_have_passed(
    cloud: Cloud, settings: Settings
) -> None:
    rows = bq_get(cloud.put(pa.table({"x": [1, None]})), settings=settings)
    model = SeesTheSame().fit(rows)

    with pytest.raises(TypeError, match="fitted on"):
        model.predict(rows.astype("float64"))
