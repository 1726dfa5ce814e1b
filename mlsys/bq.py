"""BigQuery tables and queries as frames, through the same streams as the service.

    passengers = bq_get("my-project.mlsys_dev.titanic_train")
    for chunk in bq_iter("my-project.mlsys_dev.clicks", chunk_rows=100_000): ...
    bq_put(frame, "my-project.mlsys_dev.features", "WRITE_TRUNCATE")

They work the same in a script and in Jupyter, where an event loop runs already: each call has a
loop of its own, in a thread of its own, for as long as it lasts.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread
import pyarrow as pa
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from google.api_core.exceptions import GoogleAPIError
from google.cloud import bigquery

from mlsys.append import AppendLimits, append_stream, commit_streams, create_stream, finalize_stream
from mlsys.blocking import blocking
from mlsys.chunk import Rechunker
from mlsys.clients import Clients, vendor_errors
from mlsys.errors import (
    Conflict,
    IntegrityError,
    InvalidRequest,
    NotFound,
    TableMismatch,
    Unavailable,
)
from mlsys.frame import FrameKind, to_arrow, to_frame
from mlsys.names import TableRef, shown
from mlsys.progress import ShowRows, row_bar
from mlsys.read import open_session, read_stream
from mlsys.settings import Settings
from mlsys.tables import (
    BIGQUERY_TO_ARROW,
    TableInfo,
    bigquery_column,
    check_dataset,
    create_table,
    find_table,
    standard_type,
)
from mlsys.tasks import task_group

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

type FrameName = Literal["pandas", "polars", "arrow"]
type WriteDisposition = Literal["WRITE_APPEND", "WRITE_TRUNCATE", "WRITE_EMPTY"]
type AnyFrame = pd.DataFrame | pl.DataFrame | pa.Table

_FRAMES = ("pandas", "polars", "arrow")
_PUT_ROWS = 65_536
# A single loop is no faster with more, and each has messages under way.
_LOOP_STREAMS = 4
_CLEAN_UP_SECONDS = 30
_STAGING_DAYS = 1
_ORDERED = re.compile(r"\bORDER\s+BY\b", re.IGNORECASE)
_DECIMALS = {BIGQUERY_TO_ARROW["NUMERIC"], BIGQUERY_TO_ARROW["BIGNUMERIC"]}
_NUMBERS = _DECIMALS | {pa.int64(), pa.float64()}
_DISPOSITIONS = ("WRITE_APPEND", "WRITE_TRUNCATE", "WRITE_EMPTY")


def bq_get(
    query_or_table: str, frame: FrameName = "pandas", *, settings: Settings | None = None
) -> AnyFrame:
    """Reads a whole table, or the whole result of a query.

    Args:
        query_or_table: `project.dataset.table`, or SQL. Rows of an ordered query stay in order. A
            view is read by a query.
        frame: what to return; the dtypes are those of `mlsys.frame`, which the service uses too.
        settings: where to read; by default from the environment and `.env`.

    Raises:
        NotFound: no such table.
        InvalidRequest: the query is refused, or `frame` is none of the three.
        AccessDenied, Unavailable: no credentials or no access; no answer.
    """
    _check_choice("frame", frame, _FRAMES)
    with row_bar("reading") as show, blocking(settings) as (loop, clients, chosen):
        table = loop.call(_read_whole, clients, chosen, query_or_table, show)
    return _framed(table, frame)


def bq_iter(
    query_or_table: str,
    *,
    chunk_rows: int = 65_536,
    frame: FrameName = "pandas",
    settings: Settings | None = None,
) -> Iterator[AnyFrame]:
    """Yields a table or a query's result in frames of `chunk_rows` rows, the last one shorter.

    Without rows there is no chunk. Memory stays flat however many rows there are: no more is read
    while a chunk is looked at. A loop that is left early ends the read. Raises what `bq_get`
    raises, and InvalidRequest for a `chunk_rows` below 1.
    """
    _check_choice("frame", frame, _FRAMES)
    if chunk_rows < 1:
        raise InvalidRequest(f"chunk_rows is {chunk_rows}, but a chunk needs a row at least.")
    return _iterate(query_or_table, chunk_rows, frame, settings)


def _iterate(
    query_or_table: str, chunk_rows: int, frame: FrameName, settings: Settings | None
) -> Iterator[AnyFrame]:
    with row_bar("reading") as show, blocking(settings) as (loop, clients, chosen):
        few = chosen.model_copy(update={"read_streams": min(chosen.read_streams, _LOOP_STREAMS)})
        source = loop.call(_find_source, clients, few, query_or_table)
        with loop.enter(_batches(source)) as batches:
            rechunker, rows = Rechunker(chunk_rows), 0
            while (batch := loop.call(_next, batches)) is not None:
                for chunk in rechunker.push(batch):
                    rows += chunk.num_rows
                    show(rows, source.rows)
                    yield _framed(_plain(chunk), frame)
        # Out here, so that a read that broke raises before what came of it is taken for the end.
        for chunk in rechunker.rest():
            yield _framed(_plain(chunk), frame)


def bq_put(
    frame: AnyFrame,
    table_id: str,
    write_disposition: WriteDisposition = "WRITE_APPEND",
    *,
    settings: Settings | None = None,
) -> None:
    """Writes a frame to a table, all of it or nothing; the table is made where it is missing.

    Args:
        frame: pandas, polars or Arrow. A pandas index is not written.
        table_id: `project.dataset.table`.
        write_disposition: add to the rows that are there; replace the table with its columns,
            partitions and descriptions; or refuse one that has rows.

    Raises:
        InvalidRequest: BigQuery can't take the frame: the column is named.
        TableMismatch: the table has other columns.
        Conflict: WRITE_EMPTY, and the table has rows.
        NotFound, AccessDenied, Unavailable: as the names say.
    """
    _check_choice("write_disposition", write_disposition, _DISPOSITIONS)
    ref = TableRef.parse(table_id)
    data = to_arrow(frame)
    with row_bar("writing") as show, blocking(settings) as (loop, clients, chosen):
        put = partial(put_table, clients, chosen, data, ref, write_disposition, show=show)
        loop.call(put)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRequest(f"{name} is {shown(str(value))}. Use one of {', '.join(choices)}.")


def _framed(table: pa.Table, frame: FrameName) -> AnyFrame:
    return table if frame == "arrow" else to_frame(table, FrameKind(frame))


type _Stream = Callable[[ObjectSendStream[pa.RecordBatch]], Awaitable[object]]


@dataclass(frozen=True)
class _Source:
    """Rows that can be read: each stream sends its batches and closes what it sends to."""

    schema: pa.Schema
    rows: int | None
    streams: tuple[_Stream, ...]


async def _find_source(clients: Clients, settings: Settings, query_or_table: str) -> _Source:
    if re.search(r"\s", query_or_table.strip()):
        return await _query_source(clients, settings, query_or_table)
    table = TableRef.parse(query_or_table.strip())
    try:
        info = await find_table(clients.bigquery, table, retry_seconds=settings.retry_seconds)
    except InvalidRequest:  # A view: only the result of a query on it can be streamed.
        return await _query_source(clients, settings, f"SELECT * FROM `{table}`")
    if info is None:
        raise NotFound(f"The table {table} does not exist. Check its full path.")
    return await _table_source(clients, settings, table, info.rows, settings.read_streams)


async def _query_source(clients: Clients, settings: Settings, sql: str) -> _Source:
    try:
        with vendor_errors("The query"):
            job, rows = await _run_query(clients.bigquery, sql, settings.retry_seconds)
    except NotFound as error:
        # BigQuery's own words name the table; what follows an empty line is the job's id.
        said = str(getattr(error.__cause__, "message", "")).partition("\n")[0]
        raise NotFound(f"The query names something that does not exist: {said}") from error
    if job.statement_type == "SELECT":
        # The temporary table that BigQuery keeps the result in. One stream keeps the rows' order.
        where = job.destination
        result = TableRef(where.project, where.dataset_id, where.table_id)
        streams = 1 if _ORDERED.search(sql) else settings.read_streams
        with suppress(NotFound, InvalidRequest):
            return await _table_source(clients, settings, result, rows.total_rows, streams)
    return await anyio.to_thread.run_sync(_paged_source, rows, abandon_on_cancel=True)


async def _run_query(
    client: bigquery.Client, sql: str, retry_seconds: float
) -> tuple[bigquery.QueryJob, bigquery.table.RowIterator]:
    """Runs a query; one that nobody waits for any longer is cancelled, since it costs."""
    in_thread = partial(anyio.to_thread.run_sync, abandon_on_cancel=True)
    retry = bigquery.DEFAULT_RETRY.with_timeout(retry_seconds)
    # With a job retry the client tries its first call for ten minutes, whatever `retry` says.
    job = await in_thread(partial(client.query, sql, retry=retry, job_retry=None))
    try:
        rows = await in_thread(partial(job.result, retry=retry))
        return await in_thread(partial(client.get_job, job.job_id, location=job.location)), rows
    except anyio.get_cancelled_exc_class():
        with anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True):
            await in_thread(job.cancel)
        raise


async def _table_source(
    clients: Clients, settings: Settings, table: TableRef, rows: int | None, max_streams: int
) -> _Source:
    session = await open_session(
        clients.storage,
        table,
        project=settings.gcp_project_id or table.project,
        max_streams=max_streams,
        compression=settings.read_compression,
        retry_seconds=settings.retry_seconds,
    )
    streams = (
        partial(
            read_stream,
            clients.storage,
            session,
            name,
            retry_seconds=settings.retry_seconds,
            silence_seconds=settings.silence_seconds,
        )
        for name in session.streams
    )
    return _Source(session.schema, rows, tuple(streams))


def _paged_source(rows: bigquery.table.RowIterator) -> _Source:
    """For a server whose query results can't be streamed, such as the local one."""
    with vendor_errors("The query's result"):
        pages = rows.to_arrow_iterable()
        first = next(pages, None)
        known = first if first is not None else rows.to_arrow(create_bqstorage_client=False)

    async def send(out: ObjectSendStream[pa.RecordBatch]) -> None:
        async with out:
            batch = first
            while batch is not None:
                await out.send(batch)
                with vendor_errors("The query's result"):
                    batch = await anyio.to_thread.run_sync(
                        next, pages, None, abandon_on_cancel=True
                    )

    return _Source(known.schema, rows.total_rows, (send,))


async def _read_whole(
    clients: Clients, settings: Settings, query_or_table: str, show: ShowRows
) -> pa.Table:
    source = await _find_source(clients, settings, query_or_table)
    kept: list[list[pa.RecordBatch]] = [[] for _ in source.streams]
    done = 0

    async def keep(stream: _Stream, batches: list[pa.RecordBatch]) -> None:
        nonlocal done
        async with _batches(replace(source, streams=(stream,))) as received:
            async for batch in received:
                batches.append(batch)
                done += batch.num_rows
                show(done, source.rows)

    async with task_group() as tasks:
        for stream, batches in zip(source.streams, kept, strict=True):
            tasks.start_soon(keep, stream, batches)
    # In the order of the streams, so that the same table gives the same frame.
    return _plain(pa.Table.from_batches(chain.from_iterable(kept), source.schema))


@asynccontextmanager
async def _batches(source: _Source) -> AsyncIterator[ObjectReceiveStream[pa.RecordBatch]]:
    """Reads every stream of a source, side by side, into one."""
    sender, receiver = anyio.create_memory_object_stream[pa.RecordBatch](0)
    async with receiver, task_group() as tasks:
        with sender:
            for stream in source.streams:
                tasks.start_soon(stream, sender.clone())
        yield receiver
        tasks.cancel_scope.cancel()


async def _next(batches: ObjectReceiveStream[pa.RecordBatch]) -> pa.RecordBatch | None:
    try:
        return await batches.receive()
    except anyio.EndOfStream:
        return None


def _plain(table: pa.Table) -> pa.Table:
    """Without the notes that a server hangs on its fields: queries have others than tables."""
    return table.cast(pa.schema([pa.field(f.name, _plain_type(f.type)) for f in table.schema]))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain_type(field.type)) for field in kind])
    return kind


async def put_table(
    clients: Clients,
    settings: Settings,
    data: pa.Table,
    ref: TableRef,
    disposition: WriteDisposition = "WRITE_APPEND",
    *,
    show: ShowRows = lambda done, total: None,
) -> None:
    """Writes an Arrow table as `to_arrow` gives it; see `bq_put`."""
    client, seconds = clients.bigquery, settings.retry_seconds
    found = await find_table(client, ref, retry_seconds=seconds)
    if found is None:
        await check_dataset(client, ref, retry_seconds=seconds)
    if disposition == "WRITE_TRUNCATE":
        await _put_in_place(clients, settings, data, ref, "CREATE OR REPLACE TABLE", show)
    elif disposition == "WRITE_EMPTY" and found is None:
        # Refused by BigQuery where somebody else has made the table meanwhile.
        await _put_in_place(clients, settings, data, ref, "CREATE TABLE", show)
    elif found is None:
        columns = [bigquery_column(field) for field in data.schema]
        await create_table(client, ref, columns, retry_seconds=seconds)
        await _append(clients, settings, data, ref, show)
    elif disposition == "WRITE_EMPTY" and await _has_rows(clients, settings, found):
        raise Conflict(f"{ref} has rows already. Use WRITE_APPEND, or another table.")
    else:
        await _append(clients, settings, fitted(data, found), ref, show)


async def _has_rows(clients: Clients, settings: Settings, table: TableInfo) -> bool:
    # None may be counted where there are some: those that were appended lately.
    if table.counted_rows:
        return True
    source = await _table_source(clients, settings, table.ref, None, max_streams=1)
    async with _batches(source) as batches:
        while (batch := await _next(batches)) is not None:
            if batch.num_rows:
                return True
    return False


async def _put_in_place(
    clients: Clients,
    settings: Settings,
    data: pa.Table,
    ref: TableRef,
    statement: str,
    show: ShowRows,
) -> None:
    """Fills another table first: what is there stays until one statement puts the new in place."""
    staging = TableRef(ref.project, ref.dataset, f"{ref.table}_staging_{uuid.uuid4().hex[:8]}")
    client = clients.bigquery
    columns = [bigquery_column(field) for field in data.schema]
    # It goes by itself if this process is killed.
    expires = datetime.now(UTC) + timedelta(days=_STAGING_DAYS)
    try:
        await create_table(
            client, staging, columns, expires=expires, retry_seconds=settings.retry_seconds
        )
        await _append(clients, settings, data, staging, show)
        sql = f"{statement} `{ref}` AS SELECT * FROM `{staging}`"
        try:
            with vendor_errors(f"The table {ref}"):
                await _run_query(client, sql, settings.retry_seconds)
        except Unavailable as error:
            raise Unavailable(
                f"BigQuery did not confirm that {ref} has the new rows. Look at it, and write them "
                "again if it does not."
            ) from error
    finally:
        with anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True):
            await anyio.to_thread.run_sync(_delete_table, client, staging, abandon_on_cancel=True)


def _delete_table(client: bigquery.Client, ref: TableRef) -> None:
    with suppress(GoogleAPIError, OSError):  # Whatever came before is the error worth telling.
        client.delete_table(str(ref), not_found_ok=True)


def fitted(data: pa.Table, table: TableInfo) -> pa.Table:
    """Brings columns to the types of an existing table, where that loses nothing.

    Numbers stay the numbers they are, and times the times, in UTC where they have no zone; text is
    taken for no number, but for a date or a time that it spells out.

    Raises:
        TableMismatch: the table lacks a column, has it with another type, or requires values that
            are missing; all are named.
    """
    there = {column.name.casefold(): column for column in table.columns}
    wrong, columns = [], {}
    for name, values in zip(data.column_names, data.columns, strict=True):
        column = there.get(name.casefold())
        if column is None:
            wrong.append(f"it has no column {name}")
            continue
        try:
            columns[column.name] = _converted(values, _arrow_type(column))
        except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
            wrong.append(f"{name} is {standard_type(column)}, not {values.type}")
    given = {name for name, values in columns.items() if not values.null_count}
    required = [c.name for c in table.columns if c.mode == "REQUIRED" and c.name not in given]
    wrong += [f"it requires a value of {name} in each row" for name in required]
    if wrong:
        raise TableMismatch(
            f"{table.ref} can't take the frame: {', '.join(wrong)}. Convert the frame, or replace "
            "the table with WRITE_TRUNCATE."
        )
    return pa.table(columns)


def _converted(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if values.null_count == len(values):
        # A column of an object dtype without any value tells nothing of its type.
        nothing = [] if pa.types.is_list(kind) else None
        return pa.chunked_array([pa.array([nothing] * len(values), kind)])
    given = values.type
    if not _takes(kind, given):
        raise pa.ArrowInvalid("another kind of value")
    converted = _cast(values, kind)
    # Arrow rounds a number and cuts the time of day off without a word.
    if _item(given) != pa.string() and not _cast(converted, given).equals(values):
        raise pa.ArrowInvalid("a part of the values is lost")
    return converted


def _takes(kind: pa.DataType, given: pa.DataType) -> bool:
    # Arrow takes any number but zero for true, and a number for so many microseconds.
    item, given_item = _item(kind), _item(given)
    if pa.types.is_list(kind) != pa.types.is_list(given):
        return False
    if pa.types.is_temporal(item):
        return pa.types.is_temporal(given_item) or given_item == pa.string()
    return item == given_item or {item, given_item} <= _NUMBERS


def _item(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def _cast(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.float64() in (ends := {_item(kind), _item(values.type)}) and ends & _DECIMALS:
        # By itself Arrow is an ulp off: 19.99 comes to 19.990000000000002.
        text = pa.list_(pa.string()) if pa.types.is_list(kind) else pa.string()
        values = values.cast(text)
    return values.cast(kind)


def _arrow_type(column: bigquery.SchemaField) -> pa.DataType:
    if column.mode == "REPEATED":
        return pa.list_(BIGQUERY_TO_ARROW[standard_type(column)[len("ARRAY<") : -1]])
    return BIGQUERY_TO_ARROW[standard_type(column)]


async def _append(
    clients: Clients, settings: Settings, data: pa.Table, ref: TableRef, show: ShowRows
) -> None:
    if not data.num_rows:
        return
    try:
        stream = await _sent(clients, settings, data, ref, show)
    except Unavailable as error:
        raise Unavailable(f"{error} Nothing was written.") from error
    await commit_streams(clients.storage, ref, [stream], retry_seconds=settings.retry_seconds)


async def _sent(
    clients: Clients, settings: Settings, data: pa.Table, ref: TableRef, show: ShowRows
) -> str:
    """Sends the rows into a new stream, which is finalized and which nobody sees yet."""
    limits = AppendLimits(
        settings.append_request_bytes,
        settings.append_unacked_bytes,
        settings.retry_seconds,
        settings.silence_seconds,
    )
    stream = await create_stream(clients.storage, ref, retry_seconds=settings.retry_seconds)
    source, batches = anyio.create_memory_object_stream[pa.RecordBatch](0)
    done = 0

    async def feed() -> None:
        async with source:
            for batch in data.to_batches(max_chunksize=_PUT_ROWS):
                await source.send(batch)

    def acked(rows: int) -> None:
        nonlocal done
        done += rows
        show(done, data.num_rows)

    async with batches, task_group() as tasks:
        tasks.start_soon(feed)
        await append_stream(
            clients.storage, stream, data.schema, batches, limits=limits, acked=acked
        )
    seconds = settings.retry_seconds
    if await finalize_stream(clients.storage, stream, retry_seconds=seconds) != data.num_rows:
        raise IntegrityError(f"{ref} did not take every row. Nothing was written.")
    return stream
