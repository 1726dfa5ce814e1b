"""BigQuery Storage Read API: a table as streams of Arrow record batches.

A session is a snapshot of a table, cut into streams that are read side by side. A stream that
breaks is opened again at the row it had come to, which the generated async client does only
before the first message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import grpc
import pyarrow as pa
from anyio.abc import ObjectSendStream
from google.cloud.bigquery_storage_v1 import types

from mlsys.clients import StorageApi, routing, vendor_errors
from mlsys.errors import IntegrityError, InvalidRequest, NotFound
from mlsys.names import TableRef
from mlsys.retry import Silence, resuming, retrying
from mlsys.settings import Compression
from mlsys.tasks import task_group

_CREATE_SECONDS = 120

_CODEC = types.ArrowSerializationOptions.CompressionCodec
_CODECS = {
    "none": _CODEC.COMPRESSION_UNSPECIFIED,
    "lz4": _CODEC.LZ4_FRAME,
    "zstd": _CODEC.ZSTD,
}

# What a stream of a session that has expired is answered, 6 hours after it was opened or later.
_OVER = grpc.StatusCode.FAILED_PRECONDITION


@dataclass(frozen=True)
class ReadSession:
    """A snapshot of a table: the same rows however often its streams are read, for 6 hours."""

    table: TableRef
    schema: pa.Schema
    streams: tuple[str, ...]


async def open_session(
    api: StorageApi,
    table: TableRef,
    *,
    project: str,
    columns: Sequence[str] = (),
    where: str | None = None,
    max_streams: int = 1,
    snapshot_time: datetime | None = None,
    compression: Compression = "none",
    retry_seconds: float = 60,
) -> ReadSession:
    """Opens a read session.

    Args:
        project: pays for the read.
        columns: the columns to read, all where empty; batches keep the table's order.
        where: a row filter in SQL, applied by the server.
        max_streams: as many are asked for; BigQuery may give fewer, and none for a table without
            rows. One for each gigabyte or so was seen, a single one of smaller tables:
            https://github.com/googleapis/java-bigquerystorage/issues/531
        snapshot_time: the moment of the table to read; None: now.
        compression: of the columns of each batch, which Arrow undoes as it is read.

    Raises:
        NotFound, AccessDenied, Unavailable: as the names say.
        InvalidRequest: the server refuses the filter or the columns.
    """
    message = types.CreateReadSessionRequest.pb()(
        parent=f"projects/{project}",
        max_stream_count=max_streams,
        preferred_min_stream_count=max_streams,
    )
    message.read_session.table = table.resource
    message.read_session.data_format = types.DataFormat.ARROW
    options = message.read_session.read_options
    options.selected_fields.extend(columns)
    options.row_restriction = where or ""
    options.arrow_serialization_options.buffer_compression = _CODECS[compression]
    if snapshot_time is not None:
        message.read_session.table_modifiers.snapshot_time.FromDatetime(snapshot_time)
    headers = routing(**{"read_session.table": table.resource})
    try:
        with vendor_errors(f"Reading {table}"):
            session = await retrying(
                lambda: api.create_read_session(message, metadata=headers, timeout=_CREATE_SECONDS),
                seconds=retry_seconds,
            )
    except NotFound as error:
        if where is None:
            raise
        # The local server's answer to a filter on a column that is not there.
        raise InvalidRequest(
            f"{table} can't be read with this filter. Check the names in `where`."
        ) from error
    return ReadSession(
        table=table,
        schema=pa.ipc.read_schema(pa.py_buffer(session.arrow_schema.serialized_schema)),
        streams=tuple(stream.name for stream in session.streams),
    )


async def read_stream(
    api: StorageApi,
    session: ReadSession,
    stream: str,
    out: ObjectSendStream[pa.RecordBatch],
    *,
    retry_seconds: float = 60,
    silence_seconds: float = 120,
) -> int:
    """Sends every batch of one stream to `out`, once and in order, and closes it.

    Batches are as large as the server makes them, about 1 MB. Back-pressure is the consumer's:
    nothing is read from the socket while `out` does not take a batch.

    Args:
        silence_seconds: how long to wait for a message before the stream is opened again.

    Returns:
        The number of rows sent.

    Raises:
        InvalidRequest: the session's filter fails on a row, or the session is over.
        Unavailable: the stream could not be opened again within `retry_seconds`.
    """
    rows = 0

    async def read_on() -> None:
        nonlocal rows
        request = types.ReadRowsRequest.pb()(read_stream=stream, offset=rows)
        call = api.read_rows(request, metadata=routing(read_stream=stream))
        silence = Silence(silence_seconds)
        try:
            async with task_group() as tasks:
                tasks.start_soon(silence.watch)
                silence.begin()
                while (message := await call.read()) is not grpc.aio.EOF:
                    silence.end()
                    if not message.size:  # It may carry statistics alone.
                        silence.begin()
                        continue
                    batch = pa.ipc.read_record_batch(message, session.schema)
                    await out.send(batch)
                    rows += batch.num_rows
                    # Or they would stay in memory until the next has come.
                    del message, batch
                    silence.begin()
                tasks.cancel_scope.cancel()
        finally:
            call.cancel()

    async with out:
        try:
            with vendor_errors(f"Reading {session.table}"):
                await resuming(read_on, progress=lambda: rows, seconds=retry_seconds)
        except (InvalidRequest, IntegrityError) as error:
            cause = error.__cause__
            if isinstance(cause, grpc.aio.AioRpcError) and cause.code() is _OVER:
                raise InvalidRequest(
                    f"{error} A session lasts for 6 hours: read with more cores, or the table in "
                    "parts, with `where`."
                ) from cause
            # BigQuery quotes the value that a filter fails on; the caller may not see rows.
            raise InvalidRequest(
                f"{session.table} can't be read to its end: the filter fails on a row. Mend "
                "`where`, with SAFE_CAST for instance."
            ) from error
    return rows
