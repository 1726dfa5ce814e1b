"""Servers in front of BigQuery and Cloud Storage that do to a call what a plan says.

    service → relay (TCP) → rows (gRPC, raw bytes) → BigQuery's Storage APIs
            → HTTP ───────────────────────────────→ BigQuery's REST API, Cloud Storage

They also make three things as they are at Google that the local server has otherwise: a read
starts at its offset and comes in several messages, a small table has as many streams as were asked
for, and a stream that is committed a second time is answered STREAM_ALREADY_COMMITTED.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import anyio
import grpc
import pyarrow as pa
from aiohttp import web
from google.cloud.bigquery_storage_v1 import types
from google.rpc import error_details_pb2, status_pb2
from yarl import URL

from mlsys.local import LocalServers
from mlsys.tasks import task_group
from tests.faults.plan import SILENT_SECONDS, Fault, Kind, Plan, Tell, name_of

ROWS_A_MESSAGE = 250

_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_RETRY_SECONDS = 0.05
# What a call that is under way has left when its server goes away.
_GRACE_SECONDS = 0.1
_PART = "/parts/"
_ERROR = types.StorageError.StorageErrorCode


@dataclass
class Behaviour:
    """What the servers in front of one service share: its plan, and how to signal to it."""

    plan: Plan = field(default_factory=Plan)
    tell: Tell = lambda number: None
    # Write streams that the server has forgotten: those of all services are in one set.
    gone: set[str] = field(default_factory=set)


class Ended(Exception):
    """The call ends here, with this status."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault

    async def end(self, context: grpc.aio.ServicerContext) -> None:
        if self.fault.kind is Kind.BUSY:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(self), self._retry_info())
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(self))

    def _retry_info(self) -> tuple[tuple[str, bytes], ...]:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(_RETRY_SECONDS * 1e9))
        code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        status = status_pb2.Status(code=code, message=str(self))
        status.details.add().Pack(info)
        return (("grpc-status-details-bin", status.SerializeToString()),)


class Kept:
    """Work that goes on when the call that began it has ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end(self) -> None:
        """Waits for all of it."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Relay:
    """Passes TCP connections on to `port`, and resets them when told to."""

    def __init__(self) -> None:
        self.port = 0
        self.address = ""
        self._open: set[asyncio.StreamWriter] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._open |= both
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._pass, reader, far_writer, tasks.cancel_scope)
                tasks.start_soon(self._pass, far_reader, writer, tasks.cancel_scope)
        finally:
            self._open -= both
            for each in both:
                each.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scope: anyio.CancelScope
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        scope.cancel()

    def reset(self) -> None:
        """Resets every connection."""
        for writer in self._open:
            writer.transport.abort()


class Rows(grpc.GenericRpcHandler):
    """In front of the Storage APIs."""

    def __init__(self, target: str, behaviour: Behaviour) -> None:
        self._channel = grpc.aio.insecure_channel(target, _UNLIMITED)
        self._behaviour = behaviour
        self._server: grpc.aio.Server | None = None
        self.kept = Kept()
        self.relay = Relay()
        # The streams of every commit that was passed on, and what was answered.
        self.commits: list[tuple[tuple[str, ...], bool]] = []

    async def serve(self) -> None:
        """Takes calls on a new port, to which the relay leads from now on."""
        self._server = grpc.aio.server(handlers=[self], options=_UNLIMITED)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.relay.port = port

    async def go_away(self) -> None:
        """Has the server say GOAWAY and end: its calls have a moment, new ones go to another."""
        leaving = self._server
        await self.serve()
        self.kept.start(leaving.stop(_GRACE_SECONDS))

    async def close(self) -> None:
        await self._server.stop(None)
        await self.kept.end()
        await self._channel.close()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method
        match method.rpartition("/")[2]:
            case "ReadRows":
                return grpc.unary_stream_rpc_method_handler(partial(self._answer, self._read))
            case "AppendRows":
                return grpc.stream_stream_rpc_method_handler(partial(self._answer, self._append))
        return grpc.unary_unary_rpc_method_handler(
            partial(self._answer, partial(self._unary, method))
        )

    async def _answer(self, work: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await work(request, context)
        except Ended as ended:
            await ended.end(context)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details(), error.trailing_metadata())

    async def _before(self, fault: Fault | None) -> None:
        """What happens to a call before it is passed on; raises where it is not."""
        if fault is None:
            return
        match fault.kind:
            case Kind.DELAYED:
                await asyncio.sleep(fault.seconds)
            case Kind.SILENT:
                await asyncio.sleep(SILENT_SECONDS)
            case Kind.GOAWAY:
                await self.go_away()
            case Kind.STOPPED:
                self._behaviour.tell(signal.SIGSTOP)
                await asyncio.sleep(fault.seconds)
            case Kind.REFUSED | Kind.BUSY:
                raise Ended(fault)
            case Kind.CUT:
                self.relay.reset()
                raise Ended(fault)
            case Kind.KILLED | Kind.KILLED_LATE:
                self._behaviour.tell(signal.SIGKILL)
                raise Ended(fault)

    def _after(self, fault: Fault | None) -> None:
        """What happens to a call that was applied; raises where the caller is not told."""
        if fault is None:
            return
        match fault.kind:
            case Kind.LOST:
                raise Ended(fault)
            case Kind.CUT_APPLIED:
                self.relay.reset()
                raise Ended(fault)
            case Kind.KILLED_APPLIED:
                self._behaviour.tell(signal.SIGKILL)
                raise Ended(fault)

    async def _unary(self, method: str, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        name = method.rpartition("/")[2]
        fault = self._behaviour.plan.reached(name)
        if fault is not None and fault.kind is Kind.GONE:
            self._behaviour.gone.update(_commit_of(request).write_streams)
        try:
            await self._before(fault)
        except Ended:
            if fault.kind is Kind.KILLED_LATE:
                self.kept.start(_later(fault.seconds, partial(self._pass_on, method, request)))
            raise
        # What has arrived is carried out, even if the caller is gone by then.
        answer = await asyncio.shield(self.kept.start(self._pass_on(method, request)))
        self._after(fault)
        return answer

    async def _pass_on(self, method: str, request: bytes) -> bytes:
        if method.endswith("/BatchCommitWriteStreams") and (lost := self._gone_of(request)):
            return lost
        answer = await self._channel.unary_unary(method)(request)
        match method.rpartition("/")[2]:
            case "CreateReadSession":
                return _in_parts(request, answer)
            case "BatchCommitWriteStreams":
                return self._committed(request, answer)
        return answer

    def _gone_of(self, request: bytes) -> bytes:
        """The answer to a commit of streams that are gone; nothing where they are not."""
        answer = types.BatchCommitWriteStreamsResponse.pb()()
        for stream in self._behaviour.gone.intersection(_commit_of(request).write_streams):
            answer.stream_errors.add(code=_ERROR.STREAM_NOT_FOUND, entity=stream)
        return answer.SerializeToString()

    def _committed(self, request: bytes, answer: bytes) -> bytes:
        asked = _commit_of(request)
        told = types.BatchCommitWriteStreamsResponse.pb().FromString(answer)
        self.commits.append((tuple(asked.write_streams), told.HasField("commit_time")))
        for error in told.stream_errors:
            if error.error_message.lower().endswith("state=committed"):
                error.code = _ERROR.STREAM_ALREADY_COMMITTED
        return told.SerializeToString()

    async def _read(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        plan = self._behaviour.plan
        opening = plan.reached("ReadRows")
        await self._before(opening)
        for message in _messages(request, await self._whole_stream(request)):
            fault = plan.reached("ReadRows.message")
            await self._before(fault)
            await context.write(message)
            self._after(fault)
        self._after(opening)

    async def _whole_stream(self, request: bytes) -> pa.Table:
        # To its end, since a read that is left before keeps a thread of the local server for good.
        wanted = types.ReadRowsRequest.pb().FromString(request)
        stream = types.ReadRowsRequest.pb()(read_stream=wanted.read_stream.partition(_PART)[0])
        call = self._channel.unary_stream("/google.cloud.bigquery.storage.v1.BigQueryRead/ReadRows")
        schema, batches = None, []
        async for data in call(stream.SerializeToString()):
            answer = types.ReadRowsResponse.pb().FromString(data)
            if schema is None:
                schema = pa.ipc.read_schema(pa.py_buffer(answer.arrow_schema.serialized_schema))
            batch = pa.py_buffer(answer.arrow_record_batch.serialized_record_batch)
            batches.append(pa.ipc.read_record_batch(batch, schema))
        return pa.Table.from_batches(batches, schema or pa.schema([]))

    async def _append(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> None:
        plan = self._behaviour.plan
        opening = plan.reached("AppendRows")
        await self._before(opening)
        method = "/google.cloud.bigquery.storage.v1.BigQueryWrite/AppendRows"
        call = self._channel.stream_stream(method)()
        faults: deque[Fault | None] = deque()

        async def pass_on() -> None:
            async for request in requests:
                fault = plan.reached("AppendRows.request")
                await self._before(fault)
                faults.append(fault)
                await call.write(request)
            await call.done_writing()

        try:
            async with task_group() as tasks:
                tasks.start_soon(pass_on)
                async for answer in call:
                    self._after(faults.popleft())
                    # A call can't be ended while it is written to.
                    with anyio.CancelScope(shield=True):
                        await context.write(answer)
            self._after(opening)
        finally:
            call.cancel()


def _commit_of(request: bytes) -> Any:
    return types.BatchCommitWriteStreamsRequest.pb().FromString(request)


def _in_parts(request: bytes, answer: bytes) -> bytes:
    """A session's one stream as several, as many as were asked for."""
    session = types.ReadSession.pb().FromString(answer)
    asked = types.CreateReadSessionRequest.pb().FromString(request).max_stream_count or 1
    if len(session.streams) == 1:
        whole = session.streams[0].name
        session.streams[0].name = f"{whole}{_PART}1of{asked}"
        for part in range(2, asked + 1):
            session.streams.add(name=f"{whole}{_PART}{part}of{asked}")
    return session.SerializeToString()


def _messages(request: bytes, table: pa.Table) -> Iterator[bytes]:
    """The rows of a stream's part from the asked offset on, a few to a message."""
    wanted = types.ReadRowsRequest.pb().FromString(request)
    part, _, parts = (wanted.read_stream.partition(_PART)[2] or "1of1").partition("of")
    start = table.num_rows * (int(part) - 1) // int(parts)
    end = table.num_rows * int(part) // int(parts)
    rows = table.slice(start, end - start).slice(wanted.offset).combine_chunks()
    for batch in rows.to_batches(max_chunksize=ROWS_A_MESSAGE):
        message = types.ReadRowsResponse.pb()(row_count=batch.num_rows)
        message.arrow_record_batch.serialized_record_batch = batch.serialize().to_pybytes()
        yield message.SerializeToString()


_HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


class Http:
    """In front of Cloud Storage and BigQuery's REST API, on one port."""

    def __init__(self, servers: LocalServers, behaviour: Behaviour) -> None:
        self._servers = servers
        self._behaviour = behaviour
        self._session: aiohttp.ClientSession | None = None
        self.kept = Kept()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                yield f"http://127.0.0.1:{runner.addresses[0][1]}"
            finally:
                await self.kept.end()
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        name = name_of(request.method, request.raw_path, body)
        fault = self._behaviour.plan.reached(name)
        send = partial(self._pass_on, request.method, request.raw_path, dict(request.headers), body)
        if (answer := await self._before(fault, request, send)) is not None:
            return answer
        # What has arrived is carried out, even if the caller is gone by then.
        answer = await asyncio.shield(self.kept.start(send()))
        return await self._after(fault, request, answer)

    async def _pass_on(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> web.Response:
        base = self._servers.storage if "/storage/v1/" in target else self._servers.bigquery
        async with self._session.request(
            method, URL(base + target, encoded=True), headers=_passed(headers), data=body
        ) as answer:
            return web.Response(
                status=answer.status, headers=_passed(answer.headers), body=await answer.read()
            )

    async def _before(
        self, fault: Fault | None, request: web.Request, send: Any
    ) -> web.Response | None:
        """What happens to a request before it is passed on; an answer where it is not."""
        match fault.kind if fault else None:
            case Kind.DELAYED:
                await asyncio.sleep(fault.seconds)
            case Kind.SILENT:
                await asyncio.sleep(SILENT_SECONDS)
            case Kind.STOPPED:
                self._behaviour.tell(signal.SIGSTOP)
                await asyncio.sleep(fault.seconds)
            case Kind.REFUSED:
                return _refusal(503, "backendError")
            case Kind.BUSY:
                return _refusal(429, "rateLimitExceeded", {"Retry-After": "1"})
            case Kind.CUT:
                return _cut(request)
            case Kind.KILLED:
                self._behaviour.tell(signal.SIGKILL)
                return _cut(request)
            case Kind.KILLED_LATE:
                self._behaviour.tell(signal.SIGKILL)
                self.kept.start(_later(fault.seconds, send))
                return _cut(request)
        return None

    async def _after(
        self, fault: Fault | None, request: web.Request, answer: web.Response
    ) -> web.StreamResponse:
        """What becomes of the answer to a request."""
        match fault.kind if fault else None:
            case Kind.LOST | Kind.CUT_APPLIED:
                return _cut(request)
            case Kind.KILLED_APPLIED:
                self._behaviour.tell(signal.SIGKILL)
                return _cut(request)
            case Kind.TRUNCATED:
                return await _half(request, answer)
        return answer


async def _later(seconds: float, send: Callable[[], Awaitable[Any]]) -> None:
    await asyncio.sleep(seconds)
    await send()


def _passed(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


def _refusal(status: int, reason: str, headers: dict[str, str] | None = None) -> web.Response:
    details = {"message": "told to fail", "reason": reason}
    error = {"error": {"code": status, "message": "told to fail", "errors": [details]}}
    return web.json_response(error, status=status, headers=headers)


def _cut(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _half(request: web.Request, answer: web.Response) -> web.StreamResponse:
    body = answer.body or b""
    half = web.StreamResponse(status=answer.status, headers=answer.headers)
    half.content_length = len(body)
    await half.prepare(request)
    if body:
        await half.write(bytes(body[: len(body) // 2]))
    request.transport.close()
    return half


@dataclass(frozen=True)
class Front:
    """The servers in front of one service: where they are, and what they do."""

    behaviour: Behaviour
    rows: Rows
    http: Http
    http_url: str

    @property
    def env(self) -> dict[str, str]:
        """The settings that lead a service through here."""
        return {
            "BIGQUERY_EMULATOR_HOST": self.http_url,
            "STORAGE_EMULATOR_HOST": self.http_url,
            "BIGQUERY_STORAGE_EMULATOR_HOST": self.rows.relay.address,
        }

    async def settle(self) -> None:
        """Waits until every call that is applied late has been."""
        await self.rows.kept.end()
        await self.http.kept.end()


@asynccontextmanager
async def front(servers: LocalServers, gone: set[str]) -> AsyncIterator[Front]:
    """Starts the servers in front of the local ones, on free ports of 127.0.0.1."""
    behaviour = Behaviour(gone=gone)
    rows = Rows(servers.bigquery_storage, behaviour)
    await rows.serve()
    listener = await asyncio.start_server(rows.relay.connected, "127.0.0.1", 0)
    rows.relay.address = "{}:{}".format(*listener.sockets[0].getsockname())
    http = Http(servers, behaviour)
    async with listener, http.serving() as url:
        try:
            yield Front(behaviour, rows, http, url)
        finally:
            listener.close()
            rows.relay.reset()
            await rows.close()
