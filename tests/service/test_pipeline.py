"""A run reads what it needs, counts its rows, and commits once: all or nothing."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pyarrow as pa
import pytest
from google.cloud.bigquery_storage_v1 import types

from mlsys.names import TableRef
from mlsys.read import ReadSession
from service.pipeline import Job
from service.sizing import ChunkSize
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    RefusedCall,
    RowsProxy,
    assert_nothing_appended,
    assert_problem,
    numbers,
)

MANY = 200_000  # Enough for the local server to give several streams.


@pytest.fixture(scope="module")
def table(cloud: Cloud) -> str:
    return cloud.put(numbers(1000, word=["hush"] * 1000))


@pytest.fixture(scope="module")
def large(cloud: Cloud) -> str:
    return cloud.put(numbers(MANY))


def test_every_row_of_every_stream_is_there_once(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, large: str, doubles: str
) -> None:
    output = cloud.new_table()

    response = start_behind(read_streams=4).predict(large, output, doubles, chunk_rows=777)

    assert response.json()["rows"] == MANY
    [told] = cloud.query(
        "SELECT COUNT(*) AS n, COUNT(DISTINCT id) AS ids, SUM(id) AS sum, "
        f"COUNTIF(Prediction != 2 * id) AS wrong FROM `{output}`"
    )
    assert dict(told) == {"n": MANY, "ids": MANY, "sum": sum(range(MANY)), "wrong": 0}


def test_all_streams_are_committed_together_when_each_is_finished(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, large: str, doubles: str
) -> None:
    start_behind(read_streams=4, predict_threads=4).predict(large, cloud.new_table(), doubles)

    [message] = rows.messages("BatchCommitWriteStreams")
    committed = types.BatchCommitWriteStreamsRequest.deserialize(message).write_streams
    finished = {
        types.FinalizeWriteStreamRequest.deserialize(each).name
        for each in rows.messages("FinalizeWriteStream")
    }
    assert len(committed) == 4
    assert set(committed) == finished
    assert rows.asked[-1][0] == "BatchCommitWriteStreams"


def test_one_read_stream_is_predicted_and_appended_on_every_core(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str
) -> None:
    output, model = cloud.new_table(), cloud.publish(models.Meets())
    service = start_behind(read_streams=4, predict_threads=2)

    response = service.predict(table, output, model, chunk_rows=250)

    assert response.json()["rows"] == 1000, response.text
    assert len(rows.messages("ReadRows")) == 1
    [message] = rows.messages("BatchCommitWriteStreams")
    streams = types.BatchCommitWriteStreamsRequest.deserialize(message).write_streams
    assert len(set(streams)) == 2
    told = cloud.query(f"SELECT id, Prediction FROM `{output}` ORDER BY id")
    assert [tuple(row) for row in told] == [(n, 2 * n) for n in range(1000)]


@pytest.mark.parametrize(
    ("streams", "rows", "shards"),
    [
        (1, 1000, 4),
        (1, 301, 4),
        (1, 300, 3),
        (1, 1, 1),
        (6, 1, 4),
        (3, 1, 3),
        (2, 1000, 4),
        (0, 0, 0),
        # Rows that were streamed in just now: read, but not in the table's count yet.
        (1, 0, 4),
    ],
)
def test_there_is_a_shard_a_core_where_each_has_a_chunk(
    streams: int, rows: int, shards: int
) -> None:
    names = tuple(f"stream {number}" for number in range(streams))
    session = ReadSession(TableRef("p", "d", "t"), pa.schema([]), names)
    sizes = ChunkSize(100, most_bytes=1)
    job = Job(None, None, session, pa.schema([]), None, sizes, rows)

    assert job.shards(cores=4) == shards


def test_a_shard_that_gets_no_rows_has_nothing_to_commit(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    service, output = start_behind(predict_threads=2), cloud.new_table()

    response = service.predict(table, output, doubles, chunk_rows=250, where="id < 10")

    assert response.json()["rows"] == cloud.count(output) == 10
    assert len(rows.messages("CreateWriteStream")) == 2
    assert len(rows.messages("FinalizeWriteStream")) == 1
    [message] = rows.messages("BatchCommitWriteStreams")
    assert len(types.BatchCommitWriteStreamsRequest.deserialize(message).write_streams) == 1


def test_a_table_of_one_chunk_has_one_write_stream(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    start_behind(predict_threads=2).predict(table, cloud.new_table(), doubles, chunk_rows=1000)

    assert len(rows.messages("CreateWriteStream")) == 1


def test_only_the_columns_that_are_needed_are_read_and_the_filter_is_bigquerys(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    output = cloud.new_table()

    start_behind().predict(table, output, doubles, id_columns=["id"], where="id < 3")

    [message] = rows.messages("CreateReadSession")
    session = types.CreateReadSessionRequest.deserialize(message).read_session
    assert set(session.read_options.selected_fields) == {"x", "id"}
    assert session.read_options.row_restriction == "id < 3"


def test_what_does_not_fit_is_refused_before_anything_is_asked_of_the_rows(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    output = cloud.put(pa.table({"other": [1]}))

    response = start_behind().predict(table, output, doubles)

    assert_problem(response, 422, "can't take the predictions")
    assert not rows.asked
    assert cloud.count(output) == 1


def test_rows_that_went_missing_on_the_way_are_not_committed(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    def lose_one(answer: bytes) -> bytes:
        stored = types.FinalizeWriteStreamResponse.deserialize(answer)
        stored.row_count -= 1
        return types.FinalizeWriteStreamResponse.serialize(stored)

    rows.after["FinalizeWriteStream"] = lose_one
    output = cloud.new_table()

    problem = assert_problem(
        start_behind().predict(table, output, doubles), 500, "1,000 rows were sent but 999 stored"
    )

    assert problem["type"] == "urn:mlsys:integrity-error"
    assert not rows.messages("BatchCommitWriteStreams")
    assert cloud.count(output) == 0


def test_a_commit_that_says_nothing_of_its_time_is_looked_for_in_the_table(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    rows.after["BatchCommitWriteStreams"] = lambda answer: b""
    output = cloud.new_table()

    response = start_behind().predict(table, output, doubles)

    assert response.status_code == 200, response.text
    assert cloud.count(output) == response.json()["rows"]


def test_streams_that_are_gone_are_filled_anew(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    lost = iter([True])

    def lose_once() -> None:
        if next(lost, False):
            raise RefusedCall(grpc.StatusCode.NOT_FOUND, "gone")

    rows.before["BatchCommitWriteStreams"] = lose_once
    output = cloud.new_table()

    response = start_behind().predict(table, output, doubles)

    assert response.status_code == 200, response.text
    assert cloud.count(output) == response.json()["rows"]


def test_streams_that_are_lost_again_and_again_end_the_run(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    def lose() -> None:
        raise RefusedCall(grpc.StatusCode.NOT_FOUND, "gone")

    rows.before["BatchCommitWriteStreams"] = lose
    output = cloud.new_table()

    assert_problem(start_behind().predict(table, output, doubles), 500, "keeps losing")
    assert cloud.count(output) == 0


def test_an_answer_to_the_commit_that_was_lost_is_asked_for_again(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    answers: list[bytes] = []

    def lose_first(answer: bytes) -> bytes:
        answers.append(answer)
        if len(answers) == 1:
            raise RefusedCall(grpc.StatusCode.UNAVAILABLE, "gone")
        # The local server says INVALID_STREAM_STATE where BigQuery says this.
        done = types.StorageError.StorageErrorCode.STREAM_ALREADY_COMMITTED
        return types.BatchCommitWriteStreamsResponse.serialize(
            types.BatchCommitWriteStreamsResponse(stream_errors=[types.StorageError(code=done)])
        )

    rows.after["BatchCommitWriteStreams"] = lose_first
    output = cloud.new_table()

    response = start_behind().predict(table, output, doubles)

    assert response.status_code == 200, response.text
    assert len(answers) == 2
    assert cloud.count(output) == response.json()["rows"] == 1000


def test_one_stream_that_fails_ends_them_all_and_is_the_one_that_is_told(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, large: str
) -> None:
    model = cloud.publish(models.RaisesAt(MANY - 1.0))
    output = cloud.new_table()

    response = start_behind(read_streams=4).predict(large, output, model)

    problem = assert_problem(response, 500, "ValueError")
    assert problem["stream"] == 3
    assert not rows.messages("BatchCommitWriteStreams")
    assert cloud.count(output) == 0


def test_streams_that_fail_together_are_told_as_one(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, large: str
) -> None:
    model = cloud.publish(models.Raises(ValueError("no")))

    response = start_behind(read_streams=4).predict(large, cloud.new_table(), model)

    assert_problem(response, 500, "ValueError: no")


@pytest.mark.parametrize(
    ("method", "status"),
    [
        ("CreateReadSession", 403),
        ("ReadRows", 403),
        ("CreateWriteStream", 403),
        ("AppendRows", 403),
        ("FinalizeWriteStream", 403),
        ("BatchCommitWriteStreams", 403),
    ],
)
def test_what_the_credentials_may_not_is_told_and_leaves_nothing(
    start_behind: Callable[..., Client],
    rows: RowsProxy,
    cloud: Cloud,
    table: str,
    doubles: str,
    method: str,
    status: int,
) -> None:
    def refuse() -> None:
        raise RefusedCall(grpc.StatusCode.PERMISSION_DENIED, "hush")

    rows.before[method] = refuse
    output = cloud.new_table()

    assert_problem(start_behind().predict(table, output, doubles), status, "Grant")
    assert_nothing_appended(cloud, output)


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE], ids=str
)
def test_a_filter_that_fails_on_a_row_is_told_without_the_row(
    start_behind: Callable[..., Client],
    rows: RowsProxy,
    cloud: Cloud,
    table: str,
    doubles: str,
    code: grpc.StatusCode,
) -> None:
    def refuse() -> None:
        raise RefusedCall(code, "Bad int64 value: hush")

    rows.before["ReadRows"] = refuse
    output = cloud.new_table()

    response = start_behind().predict(table, output, doubles, where="id >= 0")

    assert_problem(response, 400, "where")
    assert_nothing_appended(cloud, output)
