"""BigQuery's Storage APIs for 100 million rows: a process that makes none of them itself.

    python -m benchmarks.storage_server ['{"append_latency": 0.01}']

A read stream is one serialized Arrow batch, sent over and over (see `benchmarks.tables`). What is
appended is counted, checked and forgotten. The little of the REST API that a run needs is there
too; queries are not. It is bytes in and bytes out: an append is taken apart by hand, since the
generated types would copy it twice.

Checked of each append: its offset follows the one before, its rows are an Arrow batch of the schema
that came first, and, where they have a column `id`, the sum of it. The same sum is kept of what was
read, so a run that loses, doubles or mixes up rows can be told from one that does not.

`Options` says how slow the server is, and what it counts is `Counted`: see `Synthetic`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.compute as pc
from aiohttp import web
from google.cloud.bigquery_storage_v1 import types
from google.rpc import code_pb2, status_pb2

from benchmarks import tables
from mlsys.local import PROJECT, LocalServers, cloud_storage, ends_with_us
from mlsys.tables import bigquery_column
from mlsys.wire import fields
from service.memory import reuse_memory

ROOT = Path(__file__).parents[1]
DATASET = "rows"

_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_ERROR = types.StorageError.StorageErrorCode
_CODECS = {0: None, 1: "lz4", 2: "zstd"}


@dataclass
class Options:
    """How slow the server is; 0 is not at all.

    Attributes:
        message_bytes: about how large a message of rows is, before it is compressed.
        most_streams: the most streams that a read session gets.
        first_share: of the rows that the first of several streams gets; 0: as many as each other.
        read_latency: seconds before each message of a read stream.
        append_latency: seconds from an append to its answer; more are taken meanwhile.
        read_bandwidth, append_bandwidth: bytes a second, over all streams together.
        append_rate: answers a second, over all streams together; nothing is taken meanwhile.
        paused: no append is answered, and no more are taken.
        pause_after: pauses when so many rows are appended.
    """

    message_bytes: int = tables.MESSAGE_BYTES
    most_streams: int = 1000
    first_share: float = 0
    read_latency: float = 0
    append_latency: float = 0
    read_bandwidth: float = 0
    append_bandwidth: float = 0
    append_rate: float = 0
    paused: bool = False
    pause_after: int = 0


@dataclass
class Counted:
    """What has gone through. Each `ids_` is the sum of the column `id` of all the rows."""

    sessions: int = 0
    reads: int = 0
    rows_read: int = 0
    bytes_read: int = 0
    ids_read: int = 0
    connections: int = 0
    appends: int = 0
    rows_appended: int = 0
    bytes_appended: int = 0
    ids_appended: int = 0
    rows_committed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0


class Pace:
    """Lets through so much a second, over all who ask."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def take(self, amount: float, rate: float) -> None:
        """Waits for its turn; without a rate there is nothing to wait for."""
        if not rate:
            return
        now = time.monotonic()
        begins = max(self._free_at, now)
        self._free_at = begins + amount / rate
        if begins > now:
            await asyncio.sleep(begins - now)


# Reading


@dataclass(frozen=True)
class Template:
    """The message that a read stream repeats, and the batch that it carries."""

    batch: pa.RecordBatch
    codec: str | None

    @cached_property
    def whole(self) -> bytes:
        return self.part(0, self.batch.num_rows)

    @cached_property
    def ids(self) -> int:
        return id_sum(self.batch)

    def part(self, start: int, stop: int) -> bytes:
        """A ReadRowsResponse with the rows from `start` up to `stop`."""
        batch = self.batch.slice(start, stop - start)
        response = types.ReadRowsResponse.pb()(row_count=batch.num_rows)
        response.arrow_record_batch.serialized_record_batch = serialized(batch, self.codec)
        return response.SerializeToString()


@cache
def template(kind: str, columns: tuple[str, ...], size: int, codec: str | None) -> Template:
    return Template(tables.message(kind, columns, size), codec)


def serialized(batch: pa.RecordBatch, codec: str | None) -> bytes:
    """A batch as one message of Arrow's IPC format, without its schema."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    reader = pa.ipc.MessageReader.open_stream(sink.getvalue())
    reader.read_next_message()
    return reader.read_next_message().serialize().to_pybytes()


def id_sum(batch: pa.RecordBatch) -> int:
    """The sum of the column `id`; 0 where there is none, or it is no number."""
    where = batch.schema.get_field_index("id")
    if where < 0 or not pa.types.is_integer(batch.schema.field(where).type):
        return 0
    return pc.sum(batch.column(where), min_count=0).as_py()


@dataclass(frozen=True)
class Source:
    """A read stream: so many rows, a template at a time."""

    template: Template
    rows: int

    def messages(self, offset: int) -> Iterator[tuple[bytes, int, int]]:
        """The messages from row `offset` on, each with its rows and the sum of their ids."""
        each = self.template.batch.num_rows
        while offset < self.rows:
            start = offset % each
            stop = min(each, start + self.rows - offset)
            if stop - start == each:
                yield self.template.whole, each, self.template.ids
            else:
                part = self.template.batch.slice(start, stop - start)
                yield self.template.part(start, stop), stop - start, id_sum(part)
            offset += stop - start


# Appending


def fields_of(message: memoryview) -> dict[int, Any]:
    """The fields of a protobuf message by their numbers, of which each is there once at most."""
    return {number: value for number, _, value in fields(message)}


@dataclass
class Append:
    """What of an AppendRowsRequest is looked at, none of it copied."""

    stream: str = ""
    offset: int | None = None
    schema: memoryview | None = None
    rows: memoryview | None = None

    @classmethod
    def parse(cls, data: bytes) -> Append:
        found = fields_of(memoryview(data))
        arrow = fields_of(found[5]) if 5 in found else {}
        return cls(
            stream=str(found.get(1, b""), "utf-8"),
            offset=fields_of(found[2]).get(1, 0) if 2 in found else None,
            schema=_only(arrow.get(1)),
            rows=_only(arrow.get(2)),
        )


def _only(message: memoryview | None) -> memoryview | None:
    return None if message is None else fields_of(message).get(1)


@dataclass
class Sink:
    """A write stream, and the rows in it."""

    table: str
    schema: pa.Schema | None = None
    rows: int = 0
    finalized: bool = False
    committed: bool = False

    def take(self, append: Append, counted: Counted) -> int:
        """Applies an append and returns its offset.

        Raises:
            Refused: with what BigQuery answers.
        """
        if self.finalized:
            raise Refused(code_pb2.INVALID_ARGUMENT, "STREAM_FINALIZED", "the stream is finalized")
        if append.schema is not None:
            self.schema = pa.ipc.read_schema(pa.py_buffer(append.schema))
        offset = self.rows if append.offset is None else append.offset
        if offset < self.rows:
            raise Refused(code_pb2.ALREADY_EXISTS, "OFFSET_ALREADY_EXISTS", f"{offset} is there")
        if offset > self.rows:
            raise Refused(code_pb2.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE", f"{self.rows} is next")
        batch = self._batch(append)
        self.rows += batch.num_rows
        counted.appends += 1
        counted.rows_appended += batch.num_rows
        counted.bytes_appended += len(append.rows)
        counted.ids_appended += id_sum(batch)
        return offset

    def _batch(self, append: Append) -> pa.RecordBatch:
        if self.schema is None or append.rows is None:
            raise Refused(code_pb2.INVALID_ARGUMENT, "", "no rows, or no schema before the rows")
        try:
            return pa.ipc.read_record_batch(pa.py_buffer(append.rows), self.schema)
        except (pa.ArrowException, OSError) as error:
            raise Refused(code_pb2.INVALID_ARGUMENT, "", "the rows don't fit the schema") from error


class Refused(Exception):
    """An append that is not applied."""

    def __init__(self, code: int, name: str, message: str) -> None:
        super().__init__(name or message)
        self.status = status_pb2.Status(code=code, message=message)
        if name:
            error = types.StorageError.pb()(code=_ERROR[name], error_message=message)
            self.status.details.add().Pack(error)


# The servers


class StorageServer(grpc.GenericRpcHandler):
    """Serves every table whose name is that of a shape, and counts what is appended to any."""

    def __init__(self) -> None:
        self.options = Options()
        self.counted = Counted()
        self.sinks: dict[str, Sink] = {}
        self._sources: dict[str, Source] = {}
        self._numbers = count()
        self._reading, self._appending, self._answering = Pace(), Pace(), Pace()
        self._open = asyncio.Event()
        self._open.set()

    def set(self, **changes: Any) -> None:
        """Changes options; what runs already heeds them from its next message on."""
        self.options = dataclasses.replace(self.options, **changes)
        (self._open.clear if self.options.paused else self._open.set)()

    def rows_of(self, table: str) -> int:
        """The rows that are committed to a table."""
        return sum(s.rows for s in self.sinks.values() if s.table == table and s.committed)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        match details.method.rpartition("/")[2]:
            case "ReadRows":
                return grpc.unary_stream_rpc_method_handler(self._read)
            case "AppendRows":
                return grpc.stream_stream_rpc_method_handler(self._append)
            case "CreateReadSession":
                return _unary(types.CreateReadSessionRequest, self._session)
            case "CreateWriteStream":
                return _unary(types.CreateWriteStreamRequest, self._create)
            case "FinalizeWriteStream":
                return _unary(types.FinalizeWriteStreamRequest, self._finalize)
            case "BatchCommitWriteStreams":
                return _unary(types.BatchCommitWriteStreamsRequest, self._commit)
        return None

    async def _session(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        wanted = request.read_session
        shape = tables.shape_of(wanted.table.rpartition("/")[2])
        if shape is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"There is no table {wanted.table}")
        if wanted.read_options.row_restriction:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "This server filters no rows")
        columns = tuple(wanted.read_options.selected_fields)
        if unknown := set(columns) - set(tables.schema(shape.kind).names):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"No such columns: {unknown}")
        codec = wanted.read_options.arrow_serialization_options.buffer_compression
        rows = template(shape.kind, columns, self.options.message_bytes, _CODECS[codec])
        self.counted.sessions += 1
        session = types.ReadSession.pb()(
            name=f"{request.parent}/locations/here/sessions/{next(self._numbers)}",
            table=wanted.table,
            data_format=types.DataFormat.ARROW,
            estimated_row_count=shape.rows,
        )
        session.arrow_schema.serialized_schema = rows.batch.schema.serialize().to_pybytes()
        streams = min(request.max_stream_count or 1, self.options.most_streams, shape.rows)
        for number, share in enumerate(shared_out(shape.rows, streams, self.options.first_share)):
            name = f"{session.name}/streams/{number}"
            self._sources[name] = Source(rows, share)
            session.streams.add().name = name
        return session

    async def _read(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        request = types.ReadRowsRequest.pb().FromString(data)
        source = self._sources.get(request.read_stream)
        if source is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such read stream")
        if not 0 <= request.offset <= source.rows:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "The offset is after the last row")
        self.counted.reads += 1
        for message, rows, ids in source.messages(request.offset):
            if self.options.read_latency:
                await asyncio.sleep(self.options.read_latency)
            await self._reading.take(len(message), self.options.read_bandwidth)
            await context.write(message)
            self.counted.rows_read += rows
            self.counted.bytes_read += len(message)
            self.counted.ids_read += ids

    async def _create(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        name = f"{request.parent}/streams/{next(self._numbers)}"
        self.sinks[name] = Sink(request.parent.rpartition("/")[2])
        return types.WriteStream.pb()(name=name, type_=request.write_stream.type_)

    async def _append(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        self.counted.connections += 1
        latency = self.options.append_latency
        answers: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
        answering = asyncio.create_task(_answer_late(answers, context)) if latency else None
        stream = ""
        try:
            while (data := await context.read()) is not grpc.aio.EOF:
                append = Append.parse(data)
                # Later requests of a connection need not name the stream again.
                stream = append.stream or stream
                if stream not in self.sinks:
                    await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such write stream")
                answer = self._apply(self.sinks[stream], append)
                await self._appending.take(len(data), self.options.append_bandwidth)
                await self._answering.take(1, self.options.append_rate)
                await self._open.wait()
                if answering is None:
                    await context.write(answer)
                else:
                    answers.put_nowait((time.monotonic() + latency, answer))
                del data, append
            if answering is not None:
                answers.put_nowait(None)
                await answering
        finally:
            if answering is not None:
                answering.cancel()

    def _apply(self, sink: Sink, append: Append) -> bytes:
        response = types.AppendRowsResponse.pb()()
        try:
            response.append_result.offset.value = sink.take(append, self.counted)
        except Refused as refused:
            self.counted.errors[str(refused)] += 1
            response.error.CopyFrom(refused.status)
        limit = self.options.pause_after
        if limit and self.counted.rows_appended >= limit:
            self.set(paused=True, pause_after=0)
        return response.SerializeToString()

    async def _finalize(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if request.name not in self.sinks:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such write stream")
        sink = self.sinks[request.name]
        sink.finalized = True
        return types.FinalizeWriteStreamResponse.pb()(row_count=sink.rows)

    async def _commit(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        response = types.BatchCommitWriteStreamsResponse.pb()()
        for name in request.write_streams:
            sink = self.sinks.get(name)
            if sink is None:
                response.stream_errors.add(code=_ERROR.STREAM_NOT_FOUND, entity=name)
            elif sink.committed:
                response.stream_errors.add(code=_ERROR.STREAM_ALREADY_COMMITTED, entity=name)
            elif not sink.finalized:
                response.stream_errors.add(code=_ERROR.INVALID_STREAM_STATE, entity=name)
        if not response.stream_errors:
            response.commit_time.GetCurrentTime()
            for name in request.write_streams:
                self.sinks[name].committed = True
                self.counted.rows_committed += self.sinks[name].rows
        return response


async def _answer_late(
    answers: asyncio.Queue[tuple[float, bytes] | None], context: grpc.aio.ServicerContext
) -> None:
    while (due := await answers.get()) is not None:
        at, answer = due
        await asyncio.sleep(at - time.monotonic())
        await context.write(answer)


def shared_out(rows: int, streams: int, first: float = 0) -> list[int]:
    """The rows of each stream: as many each, but for the first where it has a part of its own."""
    if first and streams > 1:
        begin = round(first * rows)
        return [begin, *shared_out(rows - begin, streams - 1)]
    return [rows // streams + (number < rows % streams) for number in range(streams)]


def _unary(request: Any, work: Callable[..., Any]) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(
        work,
        request_deserializer=request.pb().FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )


class RestServer:
    """Tables and datasets over REST, and what the benchmarks ask the server itself."""

    def __init__(self, storage: StorageServer) -> None:
        self._storage = storage
        self._made: dict[str, dict[str, Any]] = {}

    def app(self) -> web.Application:
        app = web.Application()
        datasets = "/bigquery/v2/projects/{project}/datasets"
        app.router.add_post(datasets, self._echo)
        app.router.add_get(datasets + "/{dataset}", self._dataset)
        app.router.add_post(datasets + "/{dataset}/tables", self._create)
        app.router.add_get(datasets + "/{dataset}/tables/{table}", self._table)
        app.router.add_get("/control", self._counted)
        app.router.add_post("/control", self._set)
        app.router.add_delete("/control", self._anew)
        return app

    async def _echo(self, request: web.Request) -> web.Response:
        return web.json_response(await request.json())

    async def _dataset(self, request: web.Request) -> web.Response:
        names = request.match_info
        reference = {"projectId": names["project"], "datasetId": names["dataset"]}
        return web.json_response({"datasetReference": reference})

    async def _create(self, request: web.Request) -> web.Response:
        table = await request.json()
        name = table["tableReference"]["tableId"]
        if name in self._made:
            return _rest_error(409, "duplicate", f"Already Exists: {name}")
        self._made[name] = table | {"type": "TABLE"}
        return web.json_response(self._made[name])

    async def _table(self, request: web.Request) -> web.Response:
        names = request.match_info
        shape = tables.shape_of(names["table"])
        if shape is not None:
            columns = [bigquery_column(c).to_api_repr() for c in tables.schema(shape.kind)]
            reference = {
                "projectId": names["project"],
                "datasetId": names["dataset"],
                "tableId": names["table"],
            }
            table = {
                "tableReference": reference,
                "type": "TABLE",
                "schema": {"fields": columns},
                "numRows": str(shape.rows),
            }
        elif names["table"] in self._made:
            rows = self._storage.rows_of(names["table"])
            table = self._made[names["table"]] | {"numRows": str(rows)}
        else:
            return _rest_error(404, "notFound", f"Not found: {names['table']}")
        return web.json_response(table)

    async def _counted(self, _: web.Request) -> web.Response:
        self._storage.counted.cpu_seconds = time.process_time()
        return web.json_response(dataclasses.asdict(self._storage.counted))

    async def _set(self, request: web.Request) -> web.Response:
        self._storage.set(**await request.json())
        return web.json_response(dataclasses.asdict(self._storage.options))

    async def _anew(self, request: web.Request) -> web.Response:
        self._storage.counted = Counted()
        return await self._counted(request)


def _rest_error(status: int, reason: str, message: str) -> web.Response:
    error = {"code": status, "message": message, "errors": [{"reason": reason}]}
    return web.json_response({"error": error}, status=status)


async def serve(options: Options) -> None:
    """Serves on free ports of 127.0.0.1 and tells them on stdout, until it is killed."""
    reuse_memory()  # Or what is appended would be put into pages that the kernel clears first.
    storage = StorageServer()
    storage.set(**dataclasses.asdict(options))
    server = grpc.aio.server(options=_UNLIMITED)
    server.add_generic_rpc_handlers([storage])
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    runner = web.AppRunner(RestServer(storage).app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(json.dumps({"grpc": grpc_port, "rest": runner.addresses[0][1]}), flush=True)
    await server.wait_for_termination()


# For those who use it


@dataclass(frozen=True)
class Synthetic:
    """The running server, beside a real server of Cloud Storage."""

    servers: LocalServers
    pid: int

    def table(self, kind: str, rows: int) -> str:
        """The path of a table of a kind with so many rows: they are all there."""
        return f"{PROJECT}.{DATASET}.{tables.Shape(kind, rows).name}"

    def output(self, name: str) -> str:
        """The path of a table to write to."""
        return f"{PROJECT}.{DATASET}.{name}"

    def set(self, **options: Any) -> None:
        """Changes `Options`."""
        self._control("POST", options)

    def counted(self) -> Counted:
        """What went through since the last `anew`; the CPU seconds since the process began."""
        return Counted(**self._control("GET"))

    def anew(self) -> Counted:
        """Counts from 0 again."""
        return Counted(**self._control("DELETE"))

    def _control(self, method: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.servers.bigquery}/control"
        with urllib.request.urlopen(urllib.request.Request(url, data, method=method)) as answer:
            return json.load(answer)


@contextmanager
def synthetic_servers(**options: Any) -> Iterator[Synthetic]:
    """Starts the server, with these `Options`, and Cloud Storage, each in its own process."""
    command = [sys.executable, "-m", "benchmarks.storage_server", json.dumps(options)]
    with (
        cloud_storage() as objects,
        subprocess.Popen(
            ends_with_us(command),
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as process,
    ):
        try:
            ports = json.loads(process.stdout.readline())
            servers = LocalServers(
                f"http://127.0.0.1:{ports['rest']}", f"127.0.0.1:{ports['grpc']}", objects
            )
            yield Synthetic(servers, process.pid)
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("options", nargs="?", default="{}", help="`Options`, as a JSON object")
    asyncio.run(serve(Options(**json.loads(parser.parse_args().options))))


if __name__ == "__main__":
    main()
