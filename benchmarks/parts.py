"""The parts of a run alone: only reading, only predicting, only appending.

    python -m benchmarks.parts linear 1000000 [read predict append read+predict+append]

Each is measured with the code that the service uses, the same streams and chunks, and nothing
behind or before it: what is read is dropped, what is predicted or appended lies in memory. Parts
with a plus between them are done at once, and still none waits for another. What is measured begins
when all is imported, opened and loaded, and a first small part has been done.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from typing import Any, get_args

import anyio
import pyarrow as pa
from anyio.abc import TaskGroup

from benchmarks import models, tables
from benchmarks.models import Kind
from benchmarks.storage_server import ROOT, Synthetic, shared_out
from mlsys.append import AppendLimits, append_stream, create_stream
from mlsys.clients import Clients, open_clients
from mlsys.local import PROJECT, LocalServers
from mlsys.read import ReadSession, open_session, read_stream
from mlsys.settings import Compression, Settings
from service.contract import PredictRequest
from service.memory import reuse_memory
from service.model import ModelCache
from service.pipeline import Job, prepare
from service.predict import Work, in_threads, predict_stream
from service.source import Source
from service.threads import Threads

PARTS = ("read", "predict", "append")
AT_ONCE = "+".join(PARTS)
CODECS = get_args(Compression)
_WARM_UP_ROWS = 50_000
# Of which the results to be appended are made, before the clock starts.
_CHUNKS = 8


@dataclass(frozen=True)
class Part:
    """What a part took: by the clock, and in CPU seconds of this process and of the server.

    `bytes_read` are what the server has sent of rows meanwhile.
    """

    rows: int
    seconds: float
    cpu_seconds: float
    server_cpu_seconds: float
    bytes_read: int

    @property
    def all_cpu_seconds(self) -> float:
        return self.cpu_seconds + self.server_cpu_seconds

    def __add__(self, other: Part) -> Part:
        """Both as one, done one after the other."""
        sums = map(operator.add, astuple(self), astuple(other))
        return Part(*sums)


def alone(
    synthetic: Synthetic, kind: Kind, rows: int, parts: Sequence[str] = PARTS
) -> dict[str, Part]:
    """Measures parts one after the other, in a fresh process.

    Args:
        parts: their names; `read:zstd` is reading rows that come compressed so (`CODECS`), and
            `AT_ONCE` is all of them side by side, so many rows each.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)} | synthetic.servers.env
    # As many threads as the service has predict there; each has a core to itself.
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.parts", kind.name, str(rows), *parts]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    # The last line: what the pipeline logs comes before it.
    told = json.loads(done.stdout.splitlines()[-1])
    return {part: Part(**each) for part, each in told.items()}


async def measure(kind: Kind, rows: int, parts: Sequence[str]) -> dict[str, Part]:
    settings = Settings(_env_file=None)
    servers = LocalServers(
        settings.bigquery_emulator_host,
        settings.bigquery_storage_emulator_host,
        settings.storage_emulator_host,
    )
    synthetic = Synthetic(servers, 0)
    reuse_memory()  # As the service does.
    measured = {}
    async with open_clients(settings) as clients, anyio.create_task_group() as tasks:
        cache = ModelCache(settings.model_cache_bytes, tasks)
        first = await _job(synthetic, kind, rows, clients, cache, settings)
        if any("predict" in part or "append" in part for part in parts):
            await anyio.to_thread.run_sync(_settle, first)

        async def work_on(part: str, rows: int) -> Callable[[], Awaitable[None]]:
            name, _, codec = part.partition(":")
            job = await _job(synthetic, kind, rows, clients, cache, settings)
            job = replace(job, sizes=first.sizes)
            session = await _session(clients, job, settings, codec) if codec else job.session
            return await _WORK[name](job, session, rows, clients, settings)

        async def at_once(parts: str, rows: int) -> Callable[[], Awaitable[None]]:
            works = [await work_on(part, rows) for part in parts.split("+")]

            async def work() -> None:
                async with anyio.create_task_group() as tasks:
                    for each in works:
                        tasks.start_soon(each)

            return work

        for part in parts:
            await (await at_once(part, _WARM_UP_ROWS))()
            work = await at_once(part, rows)
            measured[part] = await _measured(synthetic, rows, work)
    return measured


async def _measured(synthetic: Synthetic, rows: int, work: Callable[[], Awaitable[None]]) -> Part:
    before = await anyio.to_thread.run_sync(synthetic.counted)
    clock, cpu = time.perf_counter(), time.process_time()
    await work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    after = await anyio.to_thread.run_sync(synthetic.counted)
    return Part(
        rows=rows,
        seconds=clock,
        cpu_seconds=cpu,
        server_cpu_seconds=after.cpu_seconds - before.cpu_seconds,
        bytes_read=after.bytes_read - before.bytes_read,
    )


async def _job(
    synthetic: Synthetic,
    kind: Kind,
    rows: int,
    clients: Clients,
    cache: ModelCache,
    settings: Settings,
) -> Job:
    request = PredictRequest(
        env="dev",
        input_table=synthetic.table(kind.table, rows),
        output_table=synthetic.output("alone"),
        model_name=kind.name,
        model_version="v1",
        id_columns=["id"],
    )
    return await prepare(
        request,
        run_id="alone",
        now=datetime.now(UTC),
        pins=None,
        clients=clients,
        cache=cache,
        settings=settings,
    )


async def _session(
    clients: Clients, job: Job, settings: Settings, compression: Compression
) -> ReadSession:
    """One like the job's, whose rows come compressed."""
    return await open_session(
        clients.storage,
        job.plan.input,
        project=PROJECT,
        columns=job.plan.columns.read,
        max_streams=settings.read_streams,
        compression=compression,
    )


async def _reading(
    job: Job, session: ReadSession, rows: int, clients: Clients, settings: Settings
) -> Callable[[], Awaitable[None]]:
    """Every stream is read, and its batches are dropped."""
    counted = 0

    async def drop(batches: Any) -> None:
        nonlocal counted
        async for batch in batches:
            counted += batch.num_rows

    async def work() -> None:
        async with anyio.create_task_group() as tasks:
            for stream in session.streams:
                sent, received = anyio.create_memory_object_stream[pa.RecordBatch](0)
                tasks.start_soon(read_stream, clients.storage, session, stream, sent)
                tasks.start_soon(drop, received)
        assert counted == rows

    return work


async def _predicting(
    job: Job, session: ReadSession, rows: int, clients: Clients, settings: Settings
) -> Callable[[], Awaitable[None]]:
    """As many streams and threads as in a run make results of batches in memory."""
    shares = [_messages(job, share) for share in shared_out(rows, len(session.streams))]
    limiter = anyio.CapacityLimiter(settings.predict_threads)
    predict = in_threads(await anyio.to_thread.run_sync(_work_of, job), limiter)
    counted = 0

    async def drop(results: Any) -> None:
        nonlocal counted
        async for result in results:
            counted += result.num_rows

    async def work() -> None:
        async with anyio.create_task_group() as tasks:
            for messages in shares:
                results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](0)
                source = Source(_giving(messages, tasks))
                stage = partial(predict_stream, predict, source.chunk, results_in, sizes=job.sizes)
                tasks.start_soon(stage)
                tasks.start_soon(drop, results_out)
        assert counted == rows

    return work


def _giving(batches: Sequence[pa.RecordBatch], tasks: TaskGroup) -> Any:
    """A stream of batches, as a stage gets them from the one before it."""
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](0)

    async def give() -> None:
        async with sent:
            for batch in batches:
                await sent.send(batch)

    tasks.start_soon(give)
    return received


def _work_of(job: Job) -> Work:
    return Work(job.predictor, job.plan, job.schema, Threads(1))


def _settle(job: Job) -> None:
    """Lets chunks become as large as they do in a run."""
    work = _work_of(job)
    while not job.sizes.settled:
        chunk = pa.Table.from_batches(_messages(job, job.sizes.rows))
        job.sizes.learn(chunk.num_rows, work(chunk).cost, chunk.nbytes)


def _messages(job: Job, rows: int) -> list[pa.RecordBatch]:
    """So many rows as a run reads them."""
    kind = tables.shape_of(job.plan.input.table).kind
    return _copies([tables.message(kind, tuple(job.plan.columns.read))], rows)


def _copies(batches: Sequence[pa.RecordBatch], rows: int) -> list[pa.RecordBatch]:
    """The batches over and over, until there are so many rows.

    Each has memory of its own: in a run no batch is met twice, and what is met again comes out of
    the cache, several times as fast as out of memory.
    """
    copies = []
    for batch in cycle(batches):
        if not rows:
            return copies
        part = batch.slice(0, rows)
        copies.append(pa.ipc.read_record_batch(part.serialize(), part.schema))
        rows -= part.num_rows


async def _appending(
    job: Job, session: ReadSession, rows: int, clients: Clients, settings: Settings
) -> Callable[[], Awaitable[None]]:
    """Results in memory go into as many streams as the service has."""
    results = await _results(job)
    limits = AppendLimits(settings.append_request_bytes, settings.append_unacked_bytes)
    shares = [_copies(results, share) for share in shared_out(rows, len(session.streams))]
    sinks = [await create_stream(clients.storage, job.plan.output) for _ in shares]

    async def append(sink: str, given: Any) -> None:
        stored = await append_stream(clients.storage, sink, job.schema, given, limits=limits)
        counts.append(stored)

    counts: list[int] = []

    async def work() -> None:
        async with anyio.create_task_group() as tasks:
            for sink, share in zip(sinks, shares, strict=True):
                tasks.start_soon(append, sink, _giving(share, tasks))
        assert sum(counts) == rows

    return work


async def _results(job: Job) -> list[pa.RecordBatch]:
    """What a run makes of a few chunks."""
    work = await anyio.to_thread.run_sync(_work_of, job)
    chunks = [pa.Table.from_batches(_messages(job, job.sizes.rows)) for _ in range(_CHUNKS)]
    made = [await anyio.to_thread.run_sync(work, chunk) for chunk in chunks]
    return [batch for each in made for batch in each.batches]


_WORK = {"read": _reading, "predict": _predicting, "append": _appending}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=[kind.name for kind in models.KINDS])
    parser.add_argument("rows", type=int)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"{', '.join(PARTS)}, read:zstd…")
    options = parser.parse_args()
    [kind] = [kind for kind in models.KINDS if kind.name == options.kind]
    parts = anyio.run(measure, kind, options.rows, options.parts)
    print(json.dumps({name: asdict(part) for name, part in parts.items()}))


if __name__ == "__main__":
    main()
