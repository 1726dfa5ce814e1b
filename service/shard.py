"""The unit of work: one read stream in, one pending write stream out.

    read stream → batches → chunks → predictions → append → pending stream

Between the stages nothing is buffered: a batch moves on when the next stage asks for it, so memory
follows from the size of a chunk. A shard knows nothing of HTTP, of the other shards or of how they
are committed, so it runs as well in another process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import anyio
import pyarrow as pa

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


async def run_shard(shard: Shard, task: Task, means: Means) -> int:
    """Reads, predicts and appends one stream; returns its rows. Nothing is visible yet.

    Raises:
        IntegrityError: rows read and rows appended are not the same number.
        Whatever the stages raise.
    """
    settings, read = means.settings, 0
    batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](0)
    results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](0)

    async def read_all() -> None:
        nonlocal read
        read = await read_stream(
            means.api,
            task.session,
            shard.source,
            batches_in,
            retry_seconds=settings.retry_seconds,
            silence_seconds=settings.silence_seconds,
        )

    async def predict_all() -> None:
        await predict_stream(
            task.predictor,
            task.plan,
            batches_out,
            results_in,
            limiter=means.limiter,
            sizes=means.sizes,
            threads=means.threads,
            stream=shard.number,
        )

    # The receive ends outlive every sender, so that a stage that fails is the one that is heard.
    with batches_out, results_out:
        async with task_group() as tasks:
            tasks.start_soon(read_all)
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
    if read != appended:
        raise IntegrityError(
            f"{read:,} rows were read but {appended:,} appended. Nothing was written."
        )
    return appended
