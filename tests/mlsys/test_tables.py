"""Tables: found, made, changed, and their types by the names of both worlds."""

from __future__ import annotations

import anyio
import pyarrow as pa
import pytest
from google.cloud.bigquery import ScalarQueryParameter, SchemaField

from mlsys.clients import Clients, open_clients
from mlsys.errors import AccessDenied, InvalidRequest, NotFound, Unavailable
from mlsys.local import free_ports
from mlsys.names import TableRef
from mlsys.settings import Settings
from mlsys.tables import (
    BIGQUERY_TO_ARROW,
    TableInfo,
    add_columns,
    bigquery_column,
    check_dataset,
    create_table,
    find_table,
    run_statement,
    standard_type,
)
from tests.conftest import Cloud
from tests.mlsys.conftest import Put
from tests.mlsys.rest_server import Answer, Request, RestServer, google_error

T = TableRef("mlsys-local", "mlsys_dev", "t")


def rest_only(url: str) -> Settings:
    return Settings(
        _env_file=None,
        gcp_project_id="mlsys-local",
        bigquery_emulator_host=url,
        bigquery_storage_emulator_host="127.0.0.1:9",
        storage_emulator_host="http://127.0.0.1:9",
    )


@pytest.mark.anyio
async def test_a_table_is_found_with_its_columns_and_rows(clients: Clients, put: Put) -> None:
    table = await put(pa.table({"id": [1, 2, 3], "name": ["a", None, "c"]}))
    found = await find_table(clients.bigquery, table)

    assert found is not None
    assert found.ref == table
    assert [(c.name, standard_type(c)) for c in found.columns] == [
        ("id", "INT64"),
        ("name", "STRING"),
    ]
    assert found.rows == 3


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["mlsys-local.mlsys_dev.nothing", "mlsys-local.nowhere.t"])
async def test_a_table_that_is_not_there_is_not_found(clients: Clients, path: str) -> None:
    assert await find_table(clients.bigquery, TableRef.parse(path)) is None


@pytest.mark.anyio
async def test_a_view_is_refused_with_the_statement_that_mends_it(
    clients: Clients, cloud: Cloud, put: Put
) -> None:
    table = await put(pa.table({"id": [1]}))
    view = TableRef.parse(cloud.new_table("view"))
    sql = f"CREATE VIEW `{view}` AS SELECT * FROM `{table}`"
    await run_statement(clients.bigquery, view, sql)

    with pytest.raises(InvalidRequest, match="is a view") as raised:
        await find_table(clients.bigquery, view)
    assert f"CREATE TABLE … AS SELECT * FROM `{view}`" in str(raised.value)


def described(kind: str | None) -> Answer:
    place = {"projectId": T.project, "datasetId": T.dataset, "tableId": T.table}
    table = {"tableReference": place, "schema": {"fields": []}, "numRows": "0"}
    return 200, table | ({"type": kind} if kind else {})


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["TABLE", "SNAPSHOT", "CLONE", None])
async def test_what_has_rows_of_its_own_can_be_streamed(rest: RestServer, kind: str | None) -> None:
    rest.answer = lambda _: described(kind)
    async with open_clients(rest_only(rest.url)) as clients:
        assert await find_table(clients.bigquery, T) == TableInfo(T, (), 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("VIEW", "a view"),
        ("MATERIALIZED_VIEW", "a materialized view"),
        ("EXTERNAL", "external"),
    ],
)
async def test_what_has_no_rows_of_its_own_can_not_be_streamed(
    rest: RestServer, kind: str, told: str
) -> None:
    rest.answer = lambda _: described(kind)
    async with open_clients(rest_only(rest.url)) as clients:
        with pytest.raises(InvalidRequest, match=told):
            await find_table(clients.bigquery, T)


@pytest.mark.anyio
async def test_rows_are_not_known_of_a_table_that_is_streamed_into(rest: RestServer) -> None:
    status, table = described("TABLE")
    buffer = {"estimatedRows": "70", "estimatedBytes": "560", "oldestEntryTime": "1700000000000"}
    rest.answer = lambda _: (status, table | {"numRows": "5", "streamingBuffer": buffer})
    async with open_clients(rest_only(rest.url)) as clients:
        found = await find_table(clients.bigquery, T)

    assert found is not None
    assert (found.counted_rows, found.rows) == (5, None)


@pytest.mark.anyio
async def test_a_table_that_is_not_open_to_the_caller_is_told_as_that(rest: RestServer) -> None:
    rest.answer = lambda _: google_error(403)
    async with open_clients(rest_only(rest.url)) as clients:
        with pytest.raises(AccessDenied, match=f"The table {T}"):
            await find_table(clients.bigquery, T)
    assert len(rest.requests) == 1


@pytest.mark.anyio
async def test_a_server_that_is_away_for_a_moment_is_asked_again(rest: RestServer) -> None:
    answers = [google_error(503), (502, b"<html>"), described("TABLE")]

    rest.answer = lambda _: answers.pop(0)
    async with open_clients(rest_only(rest.url)) as clients:
        assert await find_table(clients.bigquery, T, retry_seconds=20) is not None


@pytest.mark.anyio
async def test_a_server_that_stays_away_is_given_up_in_the_time_that_was_set() -> None:
    [port] = free_ports(1)
    async with open_clients(rest_only(f"http://127.0.0.1:{port}")) as clients:
        calls = (
            find_table(clients.bigquery, T, retry_seconds=0.01),
            check_dataset(clients.bigquery, T, retry_seconds=0.01),
            create_table(clients.bigquery, T, [], retry_seconds=0.01),
            run_statement(clients.bigquery, T, "SELECT 1", retry_seconds=0.01),
        )
        with anyio.fail_after(20):
            for call in calls:
                with pytest.raises(Unavailable):
                    await call


@pytest.mark.anyio
async def test_a_dataset_that_is_there_is_no_error(clients: Clients, put: Put) -> None:
    await check_dataset(clients.bigquery, await put(pa.table({"id": [1]})))


@pytest.mark.anyio
async def test_a_dataset_that_is_missing_is_named(clients: Clients) -> None:
    with pytest.raises(NotFound, match=r"The dataset mlsys-local\.nowhere does not exist"):
        await check_dataset(clients.bigquery, TableRef.parse("mlsys-local.nowhere.t"))


COLUMNS = [
    SchemaField("id", "INT64"),
    SchemaField("name", "STRING"),
    SchemaField("tags", "STRING", mode="REPEATED"),
]


@pytest.mark.anyio
async def test_a_table_is_made_with_its_columns(clients: Clients, cloud: Cloud) -> None:
    table = TableRef.parse(cloud.new_table())
    await create_table(clients.bigquery, table, COLUMNS)
    found = await find_table(clients.bigquery, table)

    assert found is not None
    assert [standard_type(column) for column in found.columns] == [
        "INT64",
        "STRING",
        "ARRAY<STRING>",
    ]
    assert not found.rows


@pytest.mark.anyio
async def test_a_table_that_somebody_else_has_made_is_left_as_it_is(
    clients: Clients, put: Put
) -> None:
    table = await put(pa.table({"other": ["kept"]}))
    await create_table(clients.bigquery, table, COLUMNS)
    found = await find_table(clients.bigquery, table)

    assert found is not None
    assert [column.name for column in found.columns] == ["other"]
    assert found.rows == 1


@pytest.mark.anyio
async def test_columns_are_added_to_a_table_once(clients: Clients, put: Put) -> None:
    table = await put(pa.table({"id": [1]}))
    for _ in range(2):
        await add_columns(clients.bigquery, table, COLUMNS[1:2])
        await add_columns(clients.bigquery, table, COLUMNS[1:])

    rows = await run_statement(clients.bigquery, table, f"SELECT * FROM `{table}`")
    assert [dict(row) for row in rows] == [{"id": 1, "name": None, "tags": []}]


@pytest.mark.anyio
async def test_a_statement_takes_parameters_and_gives_rows(clients: Clients, put: Put) -> None:
    table = await put(pa.table({"id": [1, 2, 3]}))
    least = ScalarQueryParameter("least", "INT64", 2)
    sql = f"SELECT id FROM `{table}` WHERE id >= @least ORDER BY id"
    rows = await run_statement(clients.bigquery, table, sql, [least])

    assert [row["id"] for row in rows] == [2, 3]


@pytest.mark.anyio
async def test_a_statement_without_a_result_gives_no_rows(clients: Clients, put: Put) -> None:
    table = await put(pa.table({"id": [1, 2]}))
    sql = f"UPDATE `{table}` SET id = id + 10 WHERE TRUE"

    assert await run_statement(clients.bigquery, table, sql) == []
    rows = await run_statement(clients.bigquery, table, f"SELECT id FROM `{table}` ORDER BY id")
    assert [row["id"] for row in rows] == [11, 12]


@pytest.mark.anyio
async def test_a_statement_that_is_refused_is_told_in_the_servers_words(clients: Clients) -> None:
    with pytest.raises(InvalidRequest, match='Unexpected identifier "SELEC"'):
        await run_statement(clients.bigquery, T, "SELEC 1")


@pytest.mark.anyio
@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize(
    "words",
    [
        "Could not serialize access to table p:d.t due to concurrent update",
        "Transaction is aborted due to concurrent update against table p:d.t",
    ],
)
async def test_a_statement_that_collides_with_another_is_run_again(
    rest: RestServer, words: str
) -> None:
    job = {
        "jobReference": {"projectId": "mlsys-local", "jobId": "j", "location": "US"},
        "jobComplete": True,
        "status": {"state": "DONE"},
        "configuration": {"query": {"query": "x"}, "jobType": "QUERY"},
        "schema": {"fields": [{"name": "n", "type": "INT64"}]},
        "rows": [{"f": [{"v": "7"}]}],
        "totalRows": "1",
    }
    answers = [google_error(400, words), google_error(400, words)]

    def answer(request: Request) -> Answer:
        return answers.pop() if answers else (200, job)

    rest.answer = answer
    async with open_clients(rest_only(rest.url)) as clients:
        rows = await run_statement(clients.bigquery, T, "UPDATE t SET x = 1 WHERE TRUE")

    assert [row["n"] for row in rows] == [7]
    assert [request.method for request in rest.requests].count("POST") == 3


TYPES = [
    "INT64",
    "FLOAT64",
    "BOOL",
    "STRING",
    "BYTES",
    "DATE",
    "TIME",
    "DATETIME",
    "TIMESTAMP",
    "NUMERIC",
    "BIGNUMERIC",
]


def test_every_type_of_bigquery_that_is_streamed_has_its_arrow_type() -> None:
    assert sorted(BIGQUERY_TO_ARROW) == sorted(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_column_has_the_type_that_its_arrow_field_stands_for(name: str) -> None:
    kind = BIGQUERY_TO_ARROW[name]
    one = bigquery_column(pa.field("x", kind))
    many = bigquery_column(pa.field("x", pa.list_(kind)))

    assert (one.name, standard_type(one), one.mode) == ("x", name, "NULLABLE")
    assert (many.name, standard_type(many), many.mode) == ("x", f"ARRAY<{name}>", "REPEATED")


@pytest.mark.parametrize(
    ("legacy", "standard"),
    [("INTEGER", "INT64"), ("FLOAT", "FLOAT64"), ("BOOLEAN", "BOOL"), ("RECORD", "STRUCT")],
)
def test_the_names_of_legacy_sql_are_not_spoken(legacy: str, standard: str) -> None:
    assert standard_type(SchemaField("x", legacy)) == standard
    assert standard_type(SchemaField("x", legacy, mode="REPEATED")) == f"ARRAY<{standard}>"


@pytest.mark.parametrize(
    "kind",
    [
        pa.int32(),
        pa.large_string(),
        pa.timestamp("ns"),
        pa.duration("us"),
        pa.dictionary(pa.int32(), pa.string()),
        pa.struct([("a", pa.int64())]),
        pa.list_(pa.list_(pa.int64())),
        pa.decimal128(10, 2),
    ],
    ids=str,
)
def test_a_field_that_no_column_can_hold_is_named(kind: pa.DataType) -> None:
    with pytest.raises(InvalidRequest, match="Column 'x': BigQuery has no column of type"):
        bigquery_column(pa.field("x", kind))
