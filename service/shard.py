"""The unit of work: rows of a read stream in, one pending write stream out.

    read stream → chunks → predictions → append → pending stream

Between the stages nothing is buffered: rows move on when the next stage asks for them, so memory
follows from the size of a chunk. A read stream may feed several shards, each of which takes the
next chunk when it is done with one: BigQuery gives smaller tables a single read stream, and takes a
few megabytes a second into each write stream. A shard knows nothing of HTTP, of the other shards or
of how they are committed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

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
from service.source import Source


@dataclass(frozen=True)
class Shard:
    """Its number in the run, and the names of its two streams."""

    number: int
    source: str
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
    api: StorageApi, session: ReadSession, settings: Settings
) -> AsyncIterator[dict[str, Source]]:
    """Reads all streams of a session for as long as the block lasts; each by its name.

    Each is as fast as its chunks are taken.

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

    sources = {}
    with ExitStack() as received:
        async with task_group() as tasks:
            for number, stream in enumerate(session.streams):
                batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](0)
                sources[stream] = Source(received.enter_context(batches_out), number)
                tasks.start_soon(read, stream, sources[stream], batches_in)
            yield sources
            tasks.cancel_scope.cancel()


async def run_shards(
    shards: Sequence[Shard], sources: Mapping[str, Source], means: Means
) -> dict[int, int]:
    """Carries out shards side by side; their rows by their numbers. Nothing is visible yet.

    Raises:
        IntegrityError: rows read and rows appended are not the same number.
        Whatever the stages raise.
    """
    counts: dict[int, int] = {}

    async def run(shard: Shard) -> None:
        counts[shard.number] = await _run(shard, sources[shard.source], means)

    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(run, shard)
    for name, source in sources.items():
        appended = sum(counts[shard.number] for shard in shards if shard.source == name)
        if (read := await source.rows()) != appended:
            raise IntegrityError(
                f"{read:,} rows were read but {appended:,} appended. Nothing was written."
            )
    return counts


async def _run(shard: Shard, source: Source, means: Means) -> int:
    settings = means.settings
    results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](0)

    async def predict_all() -> None:
        await predict_stream(means.predict, source, results_in, sizes=means.sizes)

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
