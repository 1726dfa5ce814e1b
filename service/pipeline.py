"""One run: prepared, carried out shard by shard, its streams committed last.

A run is cut into shards (`service/shard.py`), which run side by side on all cores. Their predict
calls are made in threads, or where the model holds the interpreter, in processes. When all are done
and counted, one call commits what they have written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import anyio
import pyarrow as pa
import structlog

from mlsys.append import commit_streams, create_stream, finalize_stream
from mlsys.clients import Clients
from mlsys.errors import IntegrityError, InvalidRequest, NotCommitted, NotFound, Unavailable
from mlsys.names import TableRef
from mlsys.read import ReadSession, open_session
from mlsys.settings import Settings
from mlsys.tables import TableInfo, check_dataset, count_rows, create_table, find_table
from mlsys.tasks import task_group
from service.contract import PredictRequest
from service.journal import Pins
from service.model import Model, ModelCache, load_model
from service.plan import Plan, choose_columns, make_plan, output_schema
from service.predict import Predict, Predictor, Work, describe, in_threads
from service.shard import Means, Shard, reading, run_shards
from service.sizing import ChunkSize
from service.source import Sources
from service.threads import Threads
from service.trial import interpreter_bound
from service.workers import (
    WORKER_BYTES,
    WORKER_TIMES,
    Assignment,
    in_processes,
    start_seconds,
)

_log = structlog.get_logger(__name__)

# A commit that has begun is seen through, also when the caller goes away; for so long at most.
_COMMIT_SECONDS = 30


@dataclass(frozen=True)
class Job:
    """A run that can start: what to do with which rows, and the model that it is done with.

    `schema` is that of the rows to be appended. `table_rows` are those counted of the table, which
    a filter may leave fewer of; 0: not known, as where all were streamed into it just now.
    """

    plan: Plan
    predictor: Predictor
    session: ReadSession
    schema: pa.Schema
    model: Model
    sizes: ChunkSize
    table_rows: int

    def shards(self, cores: int) -> int:
        """How many shards there are: one a core, as long as each has a chunk, or a read stream."""
        streams = len(self.session.streams)
        chunks = math.ceil(self.table_rows / self.sizes.rows) or cores
        return min(cores, max(streams, chunks)) if streams else 0


async def prepare(
    request: PredictRequest,
    *,
    run_id: str,
    now: datetime,
    pins: Pins | None,
    clients: Clients,
    cache: ModelCache,
    settings: Settings,
) -> Job:
    """Finds the tables and the model, settles the plan and opens the read session.

    No row is read and nothing is written yet.

    Args:
        now: the timestamp of the rows, where no pins set it.
        pins: what an earlier attempt of the run has settled.

    Raises:
        NotFound, InvalidRequest, AccessDenied, Unavailable: tables and model, as the names say.
        TableMismatch: the input table does not fit the model, or the output table the result.
        ModelUnusable: the model can't be loaded or can't predict.
    """
    found: dict[str, TableInfo | None] = {}

    async def find(path: str) -> None:
        found[path] = await find_table(
            clients.bigquery, TableRef.parse(path), retry_seconds=settings.retry_seconds
        )

    if request.input_table == request.output_table:
        raise InvalidRequest("input_table and output_table are the same. Name another output.")
    async with task_group() as tasks:
        tasks.start_soon(find, request.input_table)
        tasks.start_soon(find, request.output_table)
    table, output = found[request.input_table], found[request.output_table]
    if table is None:
        raise NotFound(f"The table {request.input_table} does not exist. Check its full path.")
    if output is None:
        await check_dataset(
            clients.bigquery,
            TableRef.parse(request.output_table),
            retry_seconds=settings.retry_seconds,
        )
    model = await load_model(
        clients.objects,
        cache,
        bucket=settings.model_bucket(request.env),
        name=request.model_name,
        version=pins.model_version if pins else request.model_version,
        pinned=pins.model if pins else None,
        pinned_metadata=pins.metadata if pins else None,
    )
    needs = model.needs()
    columns = choose_columns(table, needs, request.id_columns)
    predictor = await anyio.to_thread.run_sync(
        lambda: describe(
            model.estimator,
            frame=needs.frame,
            features=columns.features,
            target=model.metadata.targets,
        ),
        abandon_on_cancel=True,
    )
    plan = make_plan(
        request,
        run_id=run_id,
        table=table,
        output=output,
        columns=columns,
        needs=needs,
        outputs=predictor.outputs,
        model_version=model.version,
        chunk_rows=settings.chunk_rows,
        now=pins.predicted_at if pins else now,
    )
    session = await open_session(
        clients.storage,
        plan.input,
        project=settings.gcp_project_id or plan.input.project,
        columns=plan.columns.read,
        where=plan.where,
        max_streams=settings.read_streams,
        # The first attempt sees the table as it is: its pin is of this machine's clock.
        snapshot_time=pins.snapshot_time if pins else None,
        compression=settings.read_compression,
        retry_seconds=settings.retry_seconds,
    )
    return Job(
        plan=plan,
        predictor=predictor,
        session=session,
        schema=output_schema(plan, session.schema),
        model=model,
        sizes=ChunkSize(plan.chunk_rows, most_bytes=settings.chunk_bytes),
        table_rows=table.counted_rows or 0,
    )


async def append(
    job: Job,
    *,
    clients: Clients,
    settings: Settings,
    limiter: anyio.CapacityLimiter,
    fits: Callable[[int], bool],
    progress: Callable[[int], None],
) -> tuple[tuple[str, ...], int]:
    """Predicts every row into pending streams, which nobody sees.

    Args:
        limiter: bounds the predict calls at once over all runs of the process.
        fits: whether there is room in memory for so many bytes more.
        progress: told the number of rows of each acknowledged append.

    Returns:
        The streams, finalized; and the number of rows in them: all there are.
    """
    plan, cores = job.plan, int(limiter.total_tokens)
    found: dict[str, Any] = {}

    async def try_model(sources: Sources) -> None:
        found["workers"] = await _workers(
            job, sources, cores, settings=settings, limiter=limiter, fits=fits
        )

    async def make_places() -> None:
        if plan.creates_output:
            await create_table(
                clients.bigquery,
                plan.output,
                plan.output_columns,
                retry_seconds=settings.retry_seconds,
            )
        found["shards"] = await _create_shards(clients, job, settings, cores)

    # Rows are on their way while there is no place for them yet: the model is tried on the first.
    most_bytes = sys.maxsize if plan.chunk_rows else settings.chunk_bytes
    async with reading(clients.storage, job.session, settings, most_bytes=most_bytes) as sources:
        async with task_group() as tasks:
            tasks.start_soon(try_model, sources)
            tasks.start_soon(make_places)
        shards, workers = found["shards"], found["workers"]
        _log.info(
            "run started",
            rows=plan.rows,
            streams=len(sources),
            shards=len(shards),
            processes=workers,
        )
        # A model's own threads, where there are fewer shards than cores.
        threads = max(1, cores // max(1, len(shards)))
        async with _predicting(job, settings, workers, threads, limiter) as predict:
            means = Means(
                api=clients.storage,
                settings=settings,
                schema=job.schema,
                predict=predict,
                sizes=job.sizes,
                progress=progress,
            )
            counts = await run_shards(shards, sources, means)
    # A shard that others, or a filter, left without rows has nothing to commit.
    filled = [shard for shard in shards if counts[shard.number]]
    await _finalize(clients, filled, counts, settings)
    return tuple(shard.sink for shard in filled), sum(counts.values())


@asynccontextmanager
async def _predicting(
    job: Job, settings: Settings, workers: int, threads: int, limiter: anyio.CapacityLimiter
) -> AsyncIterator[Predict]:
    """In so many processes; or with none, in threads of this one, which call so many each."""
    if not workers:
        own = await anyio.to_thread.run_sync(Threads, threads)
        yield in_threads(Work(job.predictor, job.plan, job.schema, own), limiter)
        return
    model = job.model
    told = Assignment(job.plan, job.predictor, job.schema, model.blob, model.metadata, settings)
    async with in_processes(told, workers) as predict:
        yield predict


async def commit(
    clients: Clients,
    settings: Settings,
    output: TableRef,
    streams: Sequence[str],
    *,
    rows: int,
    predicted_at: datetime,
) -> bool:
    """Makes the rows of finalized streams visible, or finds that they are.

    A refusal does not tell whether an earlier call had committed them. The output table does: the
    rows of a run are those with its timestamp.

    Returns:
        False: the streams are gone, and none of the rows are there.

    Raises:
        Unavailable: it is not known whether they are; ask again.
        IntegrityError: some are there and some are not; or BigQuery refuses to commit.
    """
    if not streams:
        return True
    try:
        await _commit(clients, settings, output, streams)
    except NotCommitted as refusal:
        there = await count_rows(
            clients.bigquery,
            output,
            "PredictionTimestamp",
            predicted_at,
            retry_seconds=settings.retry_seconds,
        )
        if there == rows:
            return True
        if there:
            raise IntegrityError(
                f"{output} has {there:,} of the run's {rows:,} rows. Compare those whose "
                f"PredictionTimestamp is {predicted_at.isoformat()} with the input table."
            ) from refusal
        if not refusal.gone:
            raise
        return False
    return True


async def _create_shards(clients: Clients, job: Job, settings: Settings, cores: int) -> list[Shard]:
    sinks = [""] * job.shards(cores)

    async def create(number: int) -> None:
        sinks[number] = await create_stream(
            clients.storage, job.plan.output, retry_seconds=settings.retry_seconds
        )

    async with task_group() as tasks:
        for number in range(len(sinks)):
            tasks.start_soon(create, number)
    return [Shard(number, sink) for number, sink in enumerate(sinks)]


async def _workers(
    job: Job,
    sources: Sources,
    cores: int,
    *,
    settings: Settings,
    limiter: anyio.CapacityLimiter,
    fits: Callable[[int], bool],
) -> int:
    """In how many processes the model is to predict; 0: in this one."""
    calls = min(cores, settings.worker_processes, job.shards(cores))
    # Each loads the model by itself.
    each = WORKER_BYTES + WORKER_TIMES * job.model.blob.size
    if calls < 2 or not fits(calls * each):
        return 0
    bound = await interpreter_bound(
        job.predictor,
        sources.peek,
        job.table_rows,
        limiter=limiter,
        calls=calls,
        start_seconds=start_seconds(),
    )
    return calls if bound else 0


async def _finalize(
    clients: Clients, shards: Sequence[Shard], counts: Mapping[int, int], settings: Settings
) -> None:
    async def finalize(shard: Shard) -> None:
        stored = await finalize_stream(
            clients.storage, shard.sink, retry_seconds=settings.retry_seconds
        )
        if stored != counts[shard.number]:
            raise IntegrityError(
                f"{counts[shard.number]:,} rows were sent but {stored:,} stored. "
                "Nothing was written."
            )

    async with task_group() as tasks:
        for shard in shards:
            tasks.start_soon(finalize, shard)


async def _commit(
    clients: Clients, settings: Settings, output: TableRef, streams: Sequence[str]
) -> None:
    with anyio.move_on_after(_COMMIT_SECONDS, shield=True) as bounded:
        await commit_streams(clients.storage, output, streams, retry_seconds=settings.retry_seconds)
    if bounded.cancelled_caught:
        raise Unavailable(f"BigQuery did not say whether it committed the rows to {output}.")
