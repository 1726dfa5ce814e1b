"""What a BigQuery table looks like: found, made, changed, and compared with Arrow's types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import anyio.to_thread
import pyarrow as pa
from google.api_core import exceptions as api_exceptions
from google.api_core.retry import Retry
from google.cloud import bigquery
from google.cloud.bigquery import (
    DEFAULT_RETRY,
    QueryJobConfig,
    Row,
    ScalarQueryParameter,
    SchemaField,
)

from mlsys.clients import vendor_errors
from mlsys.errors import InvalidRequest, NotFound
from mlsys.names import TableRef
from mlsys.retry import retrying

_CALL_SECONDS = 30
_STATEMENT_SECONDS = 120

# The REST API answers with the names of legacy SQL.
_STANDARD = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL", "RECORD": "STRUCT"}

# https://cloud.google.com/bigquery/docs/reference/storage#arrow_schema_details
_ARROW_TO_BIGQUERY = {
    pa.int64(): "INT64",
    pa.float64(): "FLOAT64",
    pa.bool_(): "BOOL",
    pa.string(): "STRING",
    pa.binary(): "BYTES",
    pa.date32(): "DATE",
    pa.time64("us"): "TIME",
    pa.timestamp("us"): "DATETIME",
    pa.timestamp("us", "UTC"): "TIMESTAMP",
    pa.decimal128(38, 9): "NUMERIC",
    pa.decimal256(76, 38): "BIGNUMERIC",
}
BIGQUERY_TO_ARROW = {name: kind for kind, name in _ARROW_TO_BIGQUERY.items()}


@dataclass(frozen=True)
class TableInfo:
    """A table's columns, and its rows as far as BigQuery has counted them.

    Rows in the streaming buffer are read with the others, but are not among those counted:
    https://cloud.google.com/bigquery/docs/reference/rest/v2/tables#Table
    """

    ref: TableRef
    columns: tuple[SchemaField, ...]
    counted_rows: int | None
    has_streaming_buffer: bool = False

    @property
    def rows(self) -> int | None:
        """How many rows there are to read; None: not known."""
        return None if self.has_streaming_buffer else self.counted_rows


async def find_table(
    client: bigquery.Client, ref: TableRef, *, retry_seconds: float = 60
) -> TableInfo | None:
    """Looks a table up; None where there is none.

    Raises:
        InvalidRequest: it is a view or an external table, which can't be streamed.
        AccessDenied, Unavailable: as the names say.
    """
    table = await _get(f"The table {ref}", client.get_table, str(ref), retry_seconds)
    if table is None:
        return None
    if table.table_type not in ("TABLE", "SNAPSHOT", "CLONE", None):
        raise InvalidRequest(
            f"{ref} is a {table.table_type.replace('_', ' ').lower()}, which can't be read or "
            "written as a stream. Materialize it first: CREATE TABLE … AS SELECT * FROM "
            f"`{ref}`, then name that table."
        )
    return TableInfo(ref, tuple(table.schema), table.num_rows, table.streaming_buffer is not None)


async def check_dataset(
    client: bigquery.Client, ref: TableRef, *, retry_seconds: float = 60
) -> None:
    """Checks that there is a dataset for a table to be made in.

    Raises:
        NotFound: there is none.
    """
    dataset = f"{ref.project}.{ref.dataset}"
    found = await _get(f"The dataset {dataset}", client.get_dataset, dataset, retry_seconds)
    if found is None:
        raise NotFound(f"The dataset {dataset} does not exist. Create it, or name another table.")


async def create_table(
    client: bigquery.Client,
    ref: TableRef,
    columns: Sequence[SchemaField],
    *,
    expires: datetime | None = None,
    retry_seconds: float = 60,
) -> None:
    """Creates a table; one that was made meanwhile by somebody else is left as it is."""
    table = bigquery.Table(str(ref), schema=columns)
    table.expires = expires
    with vendor_errors(f"The table {ref}"):
        await _in_thread(client.create_table, table, retry_seconds, exists_ok=True)


async def add_columns(
    client: bigquery.Client,
    ref: TableRef,
    columns: Sequence[SchemaField],
    *,
    retry_seconds: float = 60,
) -> None:
    """Adds columns to a table; one that was added meanwhile by somebody else is left as it is."""
    # One by one: the local server takes no more at once.
    for column in columns:
        kind = standard_type(column)
        sql = f"ALTER TABLE `{ref}` ADD COLUMN IF NOT EXISTS {column.name} {kind}"
        await run_statement(client, ref, sql, retry_seconds=retry_seconds)


async def run_statement(
    client: bigquery.Client,
    ref: TableRef,
    sql: str,
    parameters: Sequence[ScalarQueryParameter] = (),
    *,
    retry_seconds: float = 60,
) -> list[Row]:
    """Runs one statement on a table and returns its rows, none where it has no result.

    BigQuery fails all but one of several statements that change the same rows at once; such a one
    is run again.

    Raises:
        NotFound, AccessDenied, Unavailable: as the names say.
        InvalidRequest: BigQuery refuses the statement.
    """
    run = partial(_run, client, QueryJobConfig(query_parameters=list(parameters)))
    with vendor_errors(f"The table {ref}"):
        return await retrying(
            lambda: _in_thread(run, sql, retry_seconds), seconds=retry_seconds, also=_collided
        )


async def count_rows(
    client: bigquery.Client,
    ref: TableRef,
    column: str,
    at: datetime,
    *,
    retry_seconds: float = 60,
) -> int:
    """The number of rows whose TIMESTAMP `column` is `at`, to the microsecond."""
    [row] = await run_statement(
        client,
        ref,
        f"SELECT COUNT(*) AS found FROM `{ref}` WHERE {column} = @moment",
        [ScalarQueryParameter("moment", "TIMESTAMP", at)],
        retry_seconds=retry_seconds,
    )
    return row["found"]


def _run(
    client: bigquery.Client, config: QueryJobConfig, sql: str, *, retry: Retry, timeout: float
) -> list[Row]:
    # With a job retry the client tries its first call for ten minutes, whatever `retry` says.
    job = client.query(sql, config, retry=retry, job_retry=None, timeout=timeout)
    return list(job.result(retry=retry, timeout=_STATEMENT_SECONDS))


def _collided(error: BaseException) -> bool:
    # https://cloud.google.com/bigquery/docs/troubleshoot-queries: a plain 400 otherwise.
    return isinstance(error, api_exceptions.BadRequest) and any(
        words in str(error) for words in ("Could not serialize access", "due to concurrent update")
    )


async def _get[T](subject: str, get: Callable[..., T], name: str, retry_seconds: float) -> T | None:
    with vendor_errors(subject):
        try:
            return await _in_thread(get, name, retry_seconds)
        except api_exceptions.NotFound:
            return None


async def _in_thread[T](
    call: Callable[..., T], subject: object, retry_seconds: float, **options: object
) -> T:
    # The REST client is a blocking one, and by itself it tries for ten minutes.
    retry = DEFAULT_RETRY.with_timeout(retry_seconds)
    work = partial(call, subject, retry=retry, timeout=_CALL_SECONDS, **options)
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)


def standard_type(column: SchemaField) -> str:
    """A column's type by its name in GoogleSQL: INT64, never INTEGER; ARRAY<…> if repeated."""
    name = _STANDARD.get(column.field_type, column.field_type)
    return f"ARRAY<{name}>" if column.mode == "REPEATED" else name


def bigquery_column(field: pa.Field) -> SchemaField:
    """The column that holds an Arrow field.

    Raises:
        InvalidRequest: BigQuery has no such type; the column is named.
    """
    kind, mode = field.type, "NULLABLE"
    if pa.types.is_list(kind):
        kind, mode = kind.value_type, "REPEATED"
    if kind not in _ARROW_TO_BIGQUERY:
        raise InvalidRequest(f"Column {field.name!r}: BigQuery has no column of type {kind}.")
    return SchemaField(field.name, _ARROW_TO_BIGQUERY[kind], mode=mode)
