"""BigQuery's Storage APIs in memory, on a real port: they fail where and how a test says.

The messages are the client library's own, so the code under test talks to it as it talks to
Google, over HTTP/2. A test reads afterwards what arrived: every call with its requests.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import grpc
import pyarrow as pa
from anyio.abc import ObjectReceiveStream
from google.cloud.bigquery_storage_v1 import types
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mlsys.clients import CHANNEL_OPTIONS, StorageApi

PATIENCE = 30

_ERROR = types.StorageError.StorageErrorCode
_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass(frozen=True)
class Fault:
    """A status that ends a call.

    `retry_after` is what the server's RetryInfo says. `applied` means that what was asked for is
    done before the call is lost, and `lasting` that an append fails however often it is sent.
    """

    code: grpc.StatusCode
    details: str = "told to fail"
    retry_after: float | None = None
    applied: bool = False
    lasting: bool = False

    async def end(self, context: grpc.aio.ServicerContext) -> None:
        trailer = ()
        if self.retry_after is not None:
            info = error_details_pb2.RetryInfo()
            info.retry_delay.FromNanoseconds(int(self.retry_after * 1e9))
            status = status_pb2.Status(code=self.code.value[0], message=self.details)
            status.details.add().Pack(info)
            trailer = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(self.code, self.details, trailer)


@dataclass(frozen=True)
class Silence:
    """The server says no more on a call and leaves it open.

    The message is `applied` or not as with a Fault, or `answered` like any other.
    """

    applied: bool = False
    lasting: bool = False
    answered: bool = False

    async def end(self, context: grpc.aio.ServicerContext) -> None:
        await asyncio.sleep(math.inf)


RESET = Fault(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")
LOST = Fault(grpc.StatusCode.UNAVAILABLE, "Socket closed")
LOST_APPLIED = Fault(grpc.StatusCode.UNAVAILABLE, "Socket closed", applied=True)


@dataclass(frozen=True)
class Close:
    """The server ends a stream of appends politely: before it applied a request, or after that
    without an answer, or after its answer."""

    applied: bool = False
    answered: bool = False


def answer(code: int, message: str = "told to fail") -> Any:
    """An answer with an error in it, of a `google.rpc.Code`."""
    return types.AppendRowsResponse.pb()(error=status_pb2.Status(code=code, message=message))


@dataclass
class Call:
    """One call as the server has seen it."""

    method: str
    metadata: dict[str, str]
    requests: list[Any] = field(default_factory=list)
    answers: int = 0
    cancelled: bool = False
    ended: anyio.Event = field(default_factory=anyio.Event)

    @property
    def request(self) -> Any:
        [only] = self.requests
        return only

    @property
    def offsets(self) -> list[int]:
        return [request.offset.value for request in self.requests]


@dataclass
class Sink:
    """A write stream."""

    schema: pa.Schema | None = None
    batches: list[pa.RecordBatch] = field(default_factory=list)
    rows: int = 0
    finalized: bool = False
    committed: bool = False


class StorageServer(grpc.GenericRpcHandler):
    """Serves `sources` to readers and keeps in `sinks` what is appended.

    Attributes:
        replies: by method: what the next calls get instead of the usual answer, a Fault or a
            message, in that order. For ReadRows it is the row to stop at, and a Fault or a Silence.
        steps: by offset: what happens once when an append with that offset arrives, a Fault, a
            Silence, a Close, or a message to answer.
        unasked: answers that follow the next ones, though nothing was sent for them.
        acks: while it is not set, appends are taken but not answered.
    """

    def __init__(self) -> None:
        self.address = ""
        self.calls: list[Call] = []
        self.replies: defaultdict[str, deque[Any]] = defaultdict(deque)
        self.schema = pa.schema([("id", pa.int64())])
        self.sources: dict[str, Iterable[pa.RecordBatch]] = {}
        self.sinks: dict[str, Sink] = {}
        self.steps: dict[int, Any] = {}
        self.unasked: list[Any] = []
        self.acks = anyio.Event()
        self.acks.set()
        self._changed = anyio.Event()

    def of(self, method: str) -> list[Call]:
        """The calls of a method, in the order of their arrival."""
        return [call for call in self.calls if call.method == method]

    async def until(self, seen: Callable[[], bool]) -> None:
        """Returns as soon as the calls that arrived satisfy a condition."""
        while not seen():
            await self._changed.wait()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method.rpartition("/")[2]
        metadata = dict(details.invocation_metadata)
        kind, types_of, work = {
            "CreateReadSession": ("unary_unary", types.CreateReadSessionRequest, self._session),
            "ReadRows": ("unary_stream", types.ReadRowsRequest, self._read),
            "CreateWriteStream": ("unary_unary", types.CreateWriteStreamRequest, self._create),
            "AppendRows": ("stream_stream", types.AppendRowsRequest, self._append),
            "FinalizeWriteStream": ("unary_unary", types.FinalizeWriteStreamRequest, self._finish),
            "BatchCommitWriteStreams": (
                "unary_unary",
                types.BatchCommitWriteStreamsRequest,
                self._commit,
            ),
        }[method]

        async def recorded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            call = Call(method, metadata)
            self.calls.append(call)
            self._change()
            try:
                if kind == "unary_unary":
                    call.requests.append(request)
                    return await self._unary(work, call, context)
                return await work(request, call, context)
            except asyncio.CancelledError:
                call.cancelled = True
                raise
            finally:
                call.ended.set()
                self._change()

        return getattr(grpc, f"{kind}_rpc_method_handler")(
            recorded,
            request_deserializer=types_of.pb().FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _unary(
        self, work: Callable[[Any], Any], call: Call, context: grpc.aio.ServicerContext
    ) -> Any:
        replies = self.replies[call.method]
        reply = replies.popleft() if replies else None
        if isinstance(reply, Fault):
            if reply.applied:
                work(call.request)
            await reply.end(context)
        return work(call.request) if reply is None else reply

    def _session(self, request: Any) -> Any:
        session = types.ReadSession.pb()(name="sessions/1")
        session.arrow_schema.serialized_schema = self.schema.serialize().to_pybytes()
        for name in self.sources:
            session.streams.add().name = name
        return session

    async def _read(self, request: Any, call: Call, context: grpc.aio.ServicerContext) -> None:
        call.requests.append(request)
        replies = self.replies["ReadRows"]
        stop, fault = replies.popleft() if replies else (math.inf, None)
        for batch in _window(self.sources[request.read_stream], request.offset, stop):
            response = types.ReadRowsResponse.pb()(row_count=batch.num_rows)
            if batch.num_columns:  # Else the message is one of statistics alone.
                response.arrow_record_batch.serialized_record_batch = batch.serialize().to_pybytes()
            await context.write(response)
            call.answers += 1
            self._change()
        if fault is not None:
            await fault.end(context)

    def _create(self, request: Any) -> Any:
        name = f"{request.parent}/streams/{len(self.sinks)}"
        self.sinks[name] = Sink()
        return types.WriteStream.pb()(name=name, type_=request.write_stream.type_)

    async def _append(
        self, requests: AsyncIterator[Any], call: Call, context: grpc.aio.ServicerContext
    ) -> None:
        answers, to_send = anyio.create_memory_object_stream[Any](math.inf)
        end = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._answer, to_send, call, context)
            async with answers:
                async for request in requests:
                    call.requests.append(request)
                    self._change()
                    step = self._step(request.offset.value)
                    if isinstance(step, Fault | Silence | Close):
                        if step.applied:
                            self._apply(request)
                        if isinstance(step, Close | Silence) and step.answered:
                            answers.send_nowait(self._apply(request))
                        end = step
                        if not self.acks.is_set():
                            tasks.cancel_scope.cancel()
                        break
                    answers.send_nowait(self._apply(request) if step is None else step)
                    while self.unasked:
                        answers.send_nowait(self.unasked.pop())
        if isinstance(end, Fault | Silence):
            await end.end(context)

    def _step(self, offset: int) -> Any:
        step = self.steps.pop(offset, None)
        if isinstance(step, Fault) and step.lasting:
            self.steps[offset] = step
        return step

    async def _answer(
        self,
        to_send: ObjectReceiveStream[Any],
        call: Call,
        context: grpc.aio.ServicerContext,
    ) -> None:
        async with to_send:
            async for response in to_send:
                await self.acks.wait()
                try:
                    await context.write(response)
                except grpc.aio.InternalError:
                    return  # Nobody is there any more to be answered.
                call.answers += 1

    def _apply(self, request: Any) -> Any:
        sink = self.sinks[request.write_stream]
        if schema := request.arrow_rows.writer_schema.serialized_schema:
            sink.schema = pa.ipc.read_schema(pa.py_buffer(schema))
        if request.offset.value < sink.rows:
            return answer(code_pb2.ALREADY_EXISTS)
        if request.offset.value > sink.rows:
            return answer(code_pb2.OUT_OF_RANGE)
        data = pa.py_buffer(request.arrow_rows.rows.serialized_record_batch)
        batch = pa.ipc.read_record_batch(data, sink.schema)
        sink.batches.append(batch)
        sink.rows += batch.num_rows
        self._change()
        response = types.AppendRowsResponse.pb()()
        response.append_result.offset.value = request.offset.value
        return response

    def _finish(self, request: Any) -> Any:
        sink = self.sinks[request.name]
        sink.finalized = True
        return types.FinalizeWriteStreamResponse.pb()(row_count=sink.rows)

    def _commit(self, request: Any) -> Any:
        response = types.BatchCommitWriteStreamsResponse.pb()()
        for name in request.write_streams:
            sink = self.sinks[name]
            if sink.committed:
                response.stream_errors.add(code=_ERROR.STREAM_ALREADY_COMMITTED, entity=name)
            elif not sink.finalized:
                response.stream_errors.add(code=_ERROR.INVALID_STREAM_STATE, entity=name)
        if not response.stream_errors:
            response.commit_time.GetCurrentTime()
            for name in request.write_streams:
                self.sinks[name].committed = True
        return response


def _window(
    batches: Iterable[pa.RecordBatch], start: float, stop: float
) -> Iterator[pa.RecordBatch]:
    """The rows from `start` up to `stop`, in the batches they come in."""
    row = 0
    for batch in batches:
        if row >= stop:
            return
        first, last = max(0, start - row), min(batch.num_rows, stop - row)
        if first < last:
            yield batch.slice(first, last - first)
        elif not batch.num_rows:
            yield batch
        row += batch.num_rows


@asynccontextmanager
async def storage_server() -> AsyncIterator[StorageServer]:
    """Serves on a free port of 127.0.0.1, on the loop it is started on."""
    handler = StorageServer()
    server = grpc.aio.server(options=_UNLIMITED)
    server.add_generic_rpc_handlers((handler,))
    handler.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield handler
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def storage_api(address: str) -> AsyncIterator[StorageApi]:
    """The Storage API at an address, through a channel like that of `open_clients`."""
    async with grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        yield StorageApi(channel)


class CuttingProxy:
    """A TCP proxy that drops a connection once so many bytes have come through it.

    `cuts` holds a number for each of the next connections; those after them live on.
    """

    def __init__(self, target: str, cuts: Iterable[int], *, towards_server: bool) -> None:
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self._cuts = iter([*cuts])
        self._towards_server = towards_server
        self.address = ""
        self.connections = 0
        self.dropped = 0
        self._open: set[anyio.CancelScope] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        limit = next(self._cuts, math.inf)
        there, back = (limit, math.inf) if self._towards_server else (math.inf, limit)
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        try:
            async with anyio.create_task_group() as tasks:
                self._open.add(tasks.cancel_scope)
                tasks.start_soon(self._pass, reader, far_writer, there, tasks.cancel_scope)
                tasks.start_soon(self._pass, far_reader, writer, back, tasks.cancel_scope)
        finally:
            self._open.discard(tasks.cancel_scope)
            writer.transport.abort()
            far_writer.transport.abort()

    def drop_all(self) -> None:
        for scope in self._open:
            scope.cancel()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limit: float,
        scope: anyio.CancelScope,
    ) -> None:
        left = limit
        try:
            while left and (data := await reader.read(int(min(left, 1 << 16)))):
                left -= len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        self.dropped += not left
        scope.cancel()


@asynccontextmanager
async def cutting_proxy(
    target: str, cuts: Iterable[int], *, towards_server: bool = False
) -> AsyncIterator[CuttingProxy]:
    proxy = CuttingProxy(target, cuts, towards_server=towards_server)
    server = await asyncio.start_server(proxy.connected, "127.0.0.1", 0)
    proxy.address = "{}:{}".format(*server.sockets[0].getsockname())
    async with server:
        try:
            yield proxy
        finally:
            server.close()
            proxy.drop_all()


def ids(start: int, stop: int) -> pa.RecordBatch:
    """A batch of one column `id`: start, start + 1, … below stop."""
    return pa.record_batch({"id": pa.array(range(start, stop), pa.int64())})


def batches_of(rows: int, each: int) -> list[pa.RecordBatch]:
    """The ids 0, 1, … below `rows`, `each` to a batch."""
    return [ids(start, min(start + each, rows)) for start in range(0, rows, each)]


def id_list(batches: Iterable[pa.RecordBatch | pa.Table]) -> list[int]:
    """The ids in some batches."""
    return list(itertools.chain.from_iterable(b.column("id").to_pylist() for b in batches))
