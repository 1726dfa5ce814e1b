"""The unit of work: one read stream in, one pending write stream out.

    read stream → batches → chunks → predictions → append → pending stream

Between the stages nothing is buffered: a batch moves on when the next stage asks for it, so memory
follows from the size of a chunk. A shard knows nothing of HTTP, of the other shards or of how they
are committed, so it runs as well in another process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

import anyio
import pyarrow as pa
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from mlsys.append import AppendLimits, append_stream
from mlsys.clients import StorageApi
from mlsys.errors import IntegrityError
from mlsys.read import ReadSession, read_stream
from mlsys.settings import Settings
from mlsys.tasks import task_group
from service.plan import Plan, output_schema
from service.predict import Predictor, predict_stream
from service.sizing import ChunkSize
from service.threads import Threads


@dataclass(frozen=True)
class Shard:
    """Its number in the run, and the names of its two streams."""

    number: int
    source: str
    sink: str


@dataclass(frozen=True)
class Task:
    """What the shards of a run have in common: what to do with which rows."""

    plan: Plan
    predictor: Predictor
    session: ReadSession


@dataclass(frozen=True)
class Means:
    """What shards work with.

    `limiter` bounds the predict calls at once over all runs of the process, `threads` is what each
    may take; `progress` is told the number of rows of each acknowledged append.
    """

    api: StorageApi
    settings: Settings
    limiter: anyio.CapacityLimiter
    sizes: ChunkSize
    threads: Threads
    progress: Callable[[int], None]


class Source(ObjectReceiveStream[pa.RecordBatch]):
    """The batches of a read stream that is being read; see `reading`."""

    def __init__(self, batches: ObjectReceiveStream[pa.RecordBatch]) -> None:
        self._batches = batches
        self._next: pa.RecordBatch | None = None
        self._rows = 0
        self._ended = anyio.Event()

    async def peek(self) -> pa.RecordBatch:
        """The next batch that has rows, which stays the next.

        Raises:
            anyio.EndOfStream: there is none.
        """
        while self._next is None or not self._next.num_rows:
            self._next = await self._batches.receive()
        return self._next

    async def receive(self) -> pa.RecordBatch:
        if self._next is None:
            return await self._batches.receive()
        batch, self._next = self._next, None
        return batch

    async def aclose(self) -> None:
        """Does nothing: a stage that fails would break the reader off, and be heard after it."""

    def end(self, rows: int) -> None:
        self._rows = rows
        self._ended.set()

    async def rows(self) -> int:
        """How many rows were read, once all are."""
        await self._ended.wait()
        return self._rows


@asynccontextmanager
async def reading(
    api: StorageApi, session: ReadSession, streams: Sequence[str], settings: Settings
) -> AsyncIterator[list[Source]]:
    """Reads streams for as long as the block lasts, each as fast as its batches are taken.

    Raises:
        Whatever `read_stream` raises.
    """

    async def read(stream: str, source: Source, sent: ObjectSendStream) -> None:
        rows = await read_stream(
            api,
            session,
            stream,
            sent,
            retry_seconds=settings.retry_seconds,
            silence_seconds=settings.silence_seconds,
        )
        source.end(rows)

    sources = []
    with ExitStack() as received:
        async with task_group() as tasks:
            for stream in streams:
                batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](0)
                sources.append(Source(received.enter_context(batches_out)))
                tasks.start_soon(read, stream, sources[-1], batches_in)
            yield sources
            tasks.cancel_scope.cancel()


async def run_shards(
    shards: Sequence[Shard], sources: Sequence[Source], task: Task, means: Means
) -> dict[int, int]:
    """Carries out shards side by side, each with its source; their rows by their numbers.

    Raises:
        Whatever `run_shard` raises.
    """
    counts: dict[int, int] = {}

    async def run(shard: Shard, source: Source) -> None:
        counts[shard.number] = await run_shard(shard, source, task, means)

    async with task_group() as tasks:
        for shard, source in zip(shards, sources, strict=True):
            tasks.start_soon(run, shard, source)
    return counts


async def run_shard(shard: Shard, source: Source, task: Task, means: Means) -> int:
    """Predicts and appends what is read of one stream; returns its rows. Nothing is visible yet.

    Raises:
        IntegrityError: rows read and rows appended are not the same number.
        Whatever the stages raise.
    """
    settings = means.settings
    results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](0)

    async def predict_all() -> None:
        await predict_stream(
            task.predictor,
            task.plan,
            source,
            results_in,
            limiter=means.limiter,
            sizes=means.sizes,
            threads=means.threads,
            stream=shard.number,
        )

    # The receive end outlives the sender, so that a stage that fails is the one that is heard.
    with results_out:
        async with task_group() as tasks:
            tasks.start_soon(predict_all)
            appended = await append_stream(
                means.api,
                shard.sink,
                output_schema(task.plan, task.session.schema),
                results_out,
                limits=AppendLimits(
                    settings.append_request_bytes,
                    settings.append_unacked_bytes,
                    settings.retry_seconds,
                    settings.silence_seconds,
                ),
                acked=means.progress,
            )
    if (read := await source.rows()) != appended:
        raise IntegrityError(
            f"{read:,} rows were read but {appended:,} appended. Nothing was written."
        )
    return appended
