"""The unit of work: chunks of read streams in, one pending write stream out.

    read streams → chunks → predictions → append → pending stream

Between the stages nothing is buffered: rows move on when the next stage asks for them, so memory
follows from the size of a chunk. A shard takes the next chunk when it is done with one, of the read
stream that it begins with for as long as that has rows, then of the others. For BigQuery gives
smaller tables a single read stream and may fill several unevenly, and it takes a few megabytes a
second into each write stream. A shard knows nothing of HTTP, of the other shards or of how they are
committed.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
import pyarrow as pa
from anyio.abc import ObjectSendStream

from mlsys.append import AppendLimits, append_stream
from mlsys.clients import StorageApi
from mlsys.errors import IntegrityError
from mlsys.read import ReadSession, read_stream
from mlsys.settings import Settings
from mlsys.tasks import task_group
from service.predict import Predict, predict_stream
from service.sizing import ChunkSize
from service.source import NextChunk, Source, Sources


@dataclass(frozen=True)
class Shard:
    """Its number in the run, and the name of its write stream."""

    number: int
    sink: str


@dataclass(frozen=True)
class Means:
    """What shards work with.

    `schema` is that of the rows they append; `progress` is told the number of rows of each
    acknowledged append.
    """

    api: StorageApi
    settings: Settings
    schema: pa.Schema
    predict: Predict
    sizes: ChunkSize
    progress: Callable[[int], None]


@asynccontextmanager
async def reading(
    api: StorageApi, session: ReadSession, settings: Settings, *, most_bytes: int = sys.maxsize
) -> AsyncIterator[Sources]:
    """Reads all streams of a session for as long as the block lasts.

    Each is as fast as its chunks are taken.

    Args:
        most_bytes: of a chunk.

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
            for number, stream in enumerate(session.streams):
                batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](0)
                received.enter_context(batches_out)
                source = Source(batches_out, number, most_bytes=most_bytes)
                sources.append(source)
                tasks.start_soon(read, stream, source, batches_in)
            found = Sources(sources)
            tasks.start_soon(found.look)
            yield found
            tasks.cancel_scope.cancel()


async def run_shards(shards: Sequence[Shard], sources: Sources, means: Means) -> dict[int, int]:
    """Carries out shards side by side; their rows by their numbers. Nothing is visible yet.

    Raises:
        IntegrityError: rows read and rows appended are not the same number.
        Whatever the stages raise.
    """
    counts: dict[int, int] = {}

    async def run(shard: Shard) -> None:
        next_chunk = partial(sources.chunk, first=shard.number)
        counts[shard.number] = await _run(shard, next_chunk, means)

    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(run, shard)
    appended = sum(counts.values())
    if (read := await sources.rows()) != appended:
        raise IntegrityError(
            f"{read:,} rows were read but {appended:,} appended. Nothing was written."
        )
    return counts


async def _run(shard: Shard, next_chunk: NextChunk, means: Means) -> int:
    settings = means.settings
    results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](0)

    async def predict_all() -> None:
        await predict_stream(means.predict, next_chunk, results_in, sizes=means.sizes)

    # The receive end outlives the sender, so that a stage that fails is the one that is heard.
    with results_out:
        async with task_group() as tasks:
            tasks.start_soon(predict_all)
            return await append_stream(
                means.api,
                shard.sink,
                means.schema,
                results_out,
                limits=AppendLimits(
                    settings.append_request_bytes,
                    settings.append_unacked_bytes,
                    settings.retry_seconds,
                    settings.silence_seconds,
                ),
                acked=means.progress,
            )
