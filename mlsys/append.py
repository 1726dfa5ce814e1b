"""BigQuery Storage Write API: record batches into a table, all or nothing.

Rows go to PENDING streams, which nobody sees until all streams of a run are committed by one
call. Every append names its offset, so that one that was applied but not answered is recognised
when it is sent again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import grpc
import pyarrow as pa
from anyio.abc import ObjectReceiveStream
from google.cloud.bigquery_storage_v1 import types
from google.rpc import code_pb2

from mlsys.clients import StorageApi, routing, vendor_errors
from mlsys.errors import (
    AccessDenied,
    IntegrityError,
    InvalidRequest,
    NotCommitted,
    NotFound,
    TableMismatch,
    Unavailable,
)
from mlsys.names import TableRef
from mlsys.retry import OVERWRITTEN, Silence, resuming, retrying
from mlsys.settings import LARGEST_APPEND
from mlsys.tasks import task_group
from mlsys.wire import append_request

_CALL_SECONDS = 60
_CLOSED_EARLY = "the stream of appends was closed early"
_ERROR = types.StorageError.StorageErrorCode
_PASSING = {
    code_pb2.UNAVAILABLE,
    code_pb2.ABORTED,
    code_pb2.INTERNAL,
    code_pb2.UNKNOWN,
    code_pb2.CANCELLED,
    code_pb2.DEADLINE_EXCEEDED,
}
_DENIED = {code_pb2.PERMISSION_DENIED, code_pb2.UNAUTHENTICATED}


@dataclass(frozen=True)
class AppendLimits:
    """How much an append may carry, in bytes of serialized Arrow, and how long it may take.

    An append that is not answered for `silence_seconds` is sent again on another connection.
    """

    request_bytes: int
    unacked_bytes: int
    retry_seconds: float = 60
    silence_seconds: float = 120


async def create_stream(api: StorageApi, table: TableRef, *, retry_seconds: float = 60) -> str:
    """Creates a pending stream and returns its name.

    A table made seconds ago may not be known yet where streams are created, so NOT_FOUND is
    tried again as well: make sure that the table exists before.
    """
    request = types.CreateWriteStreamRequest.pb()(parent=table.resource)
    request.write_stream.type_ = types.WriteStream.Type.PENDING
    with vendor_errors(f"Writing to {table}"):
        stream = await retrying(
            lambda: api.create_write_stream(
                request, metadata=routing(parent=table.resource), timeout=_CALL_SECONDS
            ),
            seconds=retry_seconds,
            also=_not_found,
        )
    return stream.name


def _not_found(error: BaseException) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.NOT_FOUND


async def append_stream(
    api: StorageApi,
    stream: str,
    schema: pa.Schema,
    batches: ObjectReceiveStream[pa.RecordBatch],
    *,
    limits: AppendLimits,
    acked: Callable[[int], None] = lambda rows: None,
) -> int:
    """Appends every batch to a pending stream, in order, and returns when all are acknowledged.

    Batches are cut so that no request of several rows is larger than `limits.request_bytes`, and
    no more than `limits.unacked_bytes` are under way. Their bytes are kept until they are
    acknowledged; after a lost connection they are sent again from the first that was not.

    Args:
        schema: of every batch; columns are matched to the table's by name.
        acked: told the number of rows of each acknowledged request.

    Returns:
        The number of rows appended.

    Raises:
        TableMismatch: the table can't take the rows.
        IntegrityError: the server lost an earlier append.
        Unavailable: no answer within `limits.retry_seconds`.
    """
    async with batches:
        appender = _Appender(api, stream, schema, batches, limits, acked)
        with vendor_errors("Appending rows"):
            await resuming(
                appender.run, progress=lambda: appender.progress, seconds=limits.retry_seconds
            )
    return appender.acked_rows


@dataclass(frozen=True)
class _Rows:
    """One request's worth: kept until it is acknowledged."""

    offset: int
    rows: int
    data: pa.Buffer


class _Appender:
    """What outlives a connection: the requests without an answer, and the place in the source."""

    def __init__(
        self,
        api: StorageApi,
        stream: str,
        schema: pa.Schema,
        batches: ObjectReceiveStream[pa.RecordBatch],
        limits: AppendLimits,
        acked: Callable[[int], None],
    ) -> None:
        self._api = api
        self._stream = stream
        self._schema = schema.serialize().to_pybytes()
        self._batches = batches
        self._limits = limits
        self._tell = acked
        self._parts: Iterator[pa.RecordBatch] = iter(())
        self._unsent: deque[_Rows] = deque()
        self._unacked: deque[_Rows] = deque()
        self._unacked_bytes = 0
        self._answered = anyio.Event()
        self._next_offset = 0
        self._at_end = False
        self._silence = Silence(limits.silence_seconds)
        self.acked_rows = 0

    @property
    def progress(self) -> int:
        # A row that is taken counts as well: a slow source is not the server's fault.
        return self._next_offset + self.acked_rows

    async def run(self) -> None:
        """One connection, until every row is acknowledged or the connection is lost."""
        self._unsent.extendleft(reversed(self._unacked))
        self._unacked.clear()
        self._unacked_bytes = 0
        self._silence.end()
        if await self._next() is None:
            return
        call = self._api.append_rows(metadata=routing(write_stream=self._stream))
        ending = _Ending(call)
        try:
            async with task_group() as tasks:
                tasks.start_soon(self._send, call)
                tasks.start_soon(self._silence.watch)
                await self._receive(call)
                tasks.cancel_scope.cancel()
        except grpc.aio.AioRpcError as error:
            if ending.error is None:
                raise
            raise ending.error from error
        finally:
            call.cancel()

    async def _send(self, call: Any) -> None:
        # The write stream is named in each request and the schema in a connection's first one: that
        # is what BigQuery asks for where connections are shared, and the local server always.
        schema = self._schema
        while (rows := await self._next()) is not None:
            await self._room_for(rows)
            if not self._unacked:
                self._silence.begin()
            self._unacked.append(self._unsent.popleft())
            self._unacked_bytes += len(rows.data)
            try:
                await call.write(append_request(self._stream, rows.offset, rows.data, schema))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # The connection is lost; the answers' side is told why.
            schema = b""
        # From here on the end of the call is expected, whether all is acknowledged or not.
        self._silence.begin()
        await call.done_writing()

    async def _next(self) -> _Rows | None:
        """What is to be sent next, still in `_unsent`; None at the end."""
        while not self._unsent:
            # One at a time: a part takes as much memory again once it is serialized.
            if (part := next(self._parts, None)) is not None:
                self._unsent.append(_Rows(self._next_offset, part.num_rows, part.serialize()))
                self._next_offset += part.num_rows
                continue
            try:
                batch = await self._batches.receive()
            except anyio.EndOfStream:
                self._at_end = True
                return None
            if batch.num_rows:
                self._parts = split(batch, self._limits.request_bytes)
        return self._unsent[0]

    async def _room_for(self, rows: _Rows) -> None:
        while self._unacked and self._unacked_bytes + len(rows.data) > self._limits.unacked_bytes:
            self._answered = anyio.Event()
            await self._answered.wait()

    async def _receive(self, call: Any) -> None:
        async for response in call:
            if not self._unacked:
                raise IntegrityError("BigQuery answered an append that was not sent.")
            _check(response, self._unacked[0])
            rows = self._unacked.popleft()
            self._unacked_bytes -= len(rows.data)
            if self._unacked or self._at_end:
                self._silence.begin()
            else:
                self._silence.end()
            self.acked_rows += rows.rows
            self._tell(rows.rows)
            self._answered.set()
        if self._unacked or self._unsent or not self._at_end:
            raise ConnectionResetError(_CLOSED_EARLY)


class _Ending:
    """What the server has ended a call with.

    grpcio puts an INTERNAL of its own in the place of the server's status where the call ends while
    it is written to: https://github.com/grpc/grpc/issues/36066. A done callback sees both.
    """

    def __init__(self, call: Any) -> None:
        self.error: Exception | None = None
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        code, details = _at_once(call.code()), _at_once(call.details())
        if details == OVERWRITTEN:
            return
        if code is grpc.StatusCode.OK:
            self.error = ConnectionResetError(_CLOSED_EARLY)
        else:
            trailer = _at_once(call.trailing_metadata())
            self.error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailer, details)


def _at_once[T](coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a call that is done has its status")


def _check(response: Any, rows: _Rows) -> None:
    """Raises unless `response` acknowledges `rows`."""
    if response.row_errors:
        raise TableMismatch(
            f"BigQuery refused {len(response.row_errors)} of the rows: the values don't fit the "
            "output table's columns. Nothing was written."
        )
    if response.HasField("error"):
        _check_error(response.error)
    elif response.append_result.offset.value != rows.offset:
        raise IntegrityError("BigQuery stored rows at another place than they were sent to.")


def _check_error(error: Any) -> None:
    if error.code == code_pb2.ALREADY_EXISTS:
        return  # Applied before the connection was lost; the same bytes were sent again.
    if error.code == code_pb2.OUT_OF_RANGE:
        raise IntegrityError("BigQuery lost an append that it had acknowledged.")
    if error.code in _PASSING:
        raise ConnectionResetError(error.message)
    if error.code == code_pb2.RESOURCE_EXHAUSTED:
        raise Unavailable("BigQuery takes no more rows just now: a quota is used up. Try later.")
    if error.code in _DENIED:
        raise AccessDenied("The credentials may not write to the output table.")
    raise TableMismatch(
        "BigQuery refused the rows. Compare the output table's columns with the result's: "
        f"{error.message.strip()[:300]}"
    )


def split(batch: pa.RecordBatch, limit: int) -> Iterator[pa.RecordBatch]:
    """Cuts a batch into slices of at most `limit` serialized bytes, or of one row.

    Raises:
        InvalidRequest: a single row is larger than BigQuery takes.
    """
    size = pa.ipc.get_record_batch_size(batch)
    if size <= limit or (batch.num_rows == 1 and size <= LARGEST_APPEND):
        yield batch
        return
    if batch.num_rows == 1:
        raise InvalidRequest(
            f"A row of {size:,} bytes is larger than BigQuery takes ({LARGEST_APPEND:,} bytes). "
            "Write fewer or shorter columns; in a run, those of id_columns."
        )
    rows = max(1, min(batch.num_rows // 2, batch.num_rows * limit // size))
    for start in range(0, batch.num_rows, rows):
        yield from split(batch.slice(start, rows), limit)


async def finalize_stream(api: StorageApi, stream: str, *, retry_seconds: float = 60) -> int:
    """Ends a stream for good and returns the number of rows that BigQuery holds of it."""
    request = types.FinalizeWriteStreamRequest.pb()(name=stream)
    with vendor_errors("Finishing the append"):
        response = await retrying(
            lambda: api.finalize_write_stream(
                request, metadata=routing(name=stream), timeout=_CALL_SECONDS
            ),
            seconds=retry_seconds,
        )
    return response.row_count


async def commit_streams(
    api: StorageApi, table: TableRef, streams: Sequence[str], *, retry_seconds: float = 60
) -> None:
    """Makes all rows of all finalized streams visible at once, or none.

    A lost answer is asked for again: streams that were committed already are a success.

    Raises:
        NotCommitted: BigQuery did not commit.
        Unavailable: no answer; whether it committed is not known.
    """
    request = types.BatchCommitWriteStreamsRequest.pb()(
        parent=table.resource, write_streams=streams
    )
    try:
        with vendor_errors("The commit"):
            response = await retrying(
                lambda: api.batch_commit_write_streams(
                    request, metadata=routing(parent=table.resource), timeout=_CALL_SECONDS
                ),
                seconds=retry_seconds,
            )
    except NotFound as error:
        raise NotCommitted(
            "BigQuery does not know the streams of the rows any more. Nothing was written.",
            gone=True,
        ) from error
    except Unavailable as error:
        raise Unavailable(
            f"BigQuery did not say whether it committed the rows to {table}. Look for them there "
            "before you try again."
        ) from error
    # There is no exception where nothing was committed, only an answer without a commit time.
    if response.HasField("commit_time"):
        return
    codes = {error.code for error in response.stream_errors}
    if codes != {_ERROR.STREAM_ALREADY_COMMITTED}:
        names = ", ".join(sorted(map(_error_name, codes))) or "no reason given"
        raise NotCommitted(
            f"BigQuery did not commit the rows ({names}). Nothing was written.",
            gone=_ERROR.STREAM_NOT_FOUND in codes,
        )


def _error_name(code: int) -> str:
    # BigQuery may answer with a code that is newer than the client library.
    return _ERROR(code).name if code in _ERROR else str(code)
