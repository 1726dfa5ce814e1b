"""Shards in processes of their own, for models that hold Python's interpreter.

A worker is forked from a server process that has imported what predicting needs and nothing else:
it starts in no time, and shares those pages with the others. It opens clients of its own, loads the
very generation of the model that the run has, and reads, predicts and appends its shards. No row
passes through the parent, which only hears of progress, and commits.

Whatever happens to a worker happens before anything is visible. It ends as soon as its parent does.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import anyio
import anyio.to_thread
import structlog

from mlsys.clients import open_clients
from mlsys.errors import MlsysError, Unavailable
from mlsys.gcs import Blob
from mlsys.metadata import ModelMetadata
from mlsys.settings import Settings
from mlsys.tasks import task_group
from service.logs import configure_logging, log_retries
from service.memory import reuse_memory
from service.model import load_estimator
from service.shard import Means, Shard, Task, reading, run_shards
from service.sizing import ChunkSize
from service.threads import Threads

_log = structlog.get_logger(__name__)

# What a worker was seen to hold beside the pages that it shares, its part of the server included.
WORKER_BYTES = 160 * 2**20

_SHRINK = "shrink"
_END_SECONDS = 5


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told. The estimator is not in the task: the worker loads it."""

    task: Task
    shards: tuple[Shard, ...]
    blob: Blob
    metadata: ModelMetadata
    settings: Settings


async def run_in_processes(
    assignments: Sequence[Assignment], sizes: ChunkSize, progress: Callable[[int], None]
) -> dict[int, int]:
    """Carries out each assignment in a process; the rows of each shard by its number.

    Args:
        sizes: whose want of memory the workers hear of.
        progress: told the number of rows of each acknowledged append.

    Raises:
        Unavailable: a process ended before its shards were done.
        Whatever a shard raises.
    """
    counts: dict[int, int] = {}

    async def employ(assignment: Assignment) -> None:
        counts.update(await _employ(assignment, sizes, progress))

    async with task_group() as tasks:
        for assignment in assignments:
            tasks.start_soon(employ, assignment)
    return counts


def assignments(task: Task, shards: Sequence[Shard], workers: int, **told: Any) -> list[Assignment]:
    """The shards dealt out to so many workers, or fewer where there are fewer shards."""
    bare = replace(task, predictor=replace(task.predictor, estimator=None))
    shares = [tuple(shards[start::workers]) for start in range(min(workers, len(shards)))]
    return [Assignment(bare, share, **told) for share in shares]


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.workers", "sklearn.pipeline", "pandas"])
    return context


async def _employ(
    assignment: Assignment, sizes: ChunkSize, progress: Callable[[int], None]
) -> dict[int, int]:
    ours, theirs = _context().Pipe()
    process = _context().Process(target=_main, args=(theirs, assignment), daemon=True)
    limiter = anyio.CapacityLimiter(1)  # It waits for as long as the run lasts.
    try:
        await anyio.to_thread.run_sync(process.start)
        theirs.close()
        _log.info("worker started", pid=process.pid, shards=len(assignment.shards))
        sizes.follow(partial(_tell_to_shrink, ours))
        while True:
            told = await anyio.to_thread.run_sync(
                ours.recv, limiter=limiter, abandon_on_cancel=True
            )
            match told:
                case int():
                    progress(told)
                case dict():
                    return told
                case BaseException():
                    raise told
    except EOFError:
        await _end(process)
        raise Unavailable(
            f"A process of this run ended (exit status {process.exitcode}). Nothing was written. "
            "If it ends so again, give the service more memory."
        ) from None
    finally:
        await _end(process)
        ours.close()


def _tell_to_shrink(connection: Connection) -> None:
    with suppress(OSError):  # It has ended.
        connection.send(_SHRINK)


async def _end(process: Any) -> None:
    """Sees a worker to its end; there is nothing in it that would be lost."""
    if process.pid is None:
        return
    with anyio.CancelScope(shield=True):
        process.kill()
        await anyio.to_thread.run_sync(process.join, _END_SECONDS)


def _main(connection: Connection, assignment: Assignment) -> None:
    """What a worker does, from its fork to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us.
    reuse_memory()
    configure_logging()
    log_retries()
    structlog.contextvars.bind_contextvars(run_id=assignment.task.plan.run_id)
    try:
        connection.send(anyio.run(_carry_out, connection, assignment))
    except MlsysError as error:
        connection.send(error)
    except Exception as error:
        _log.exception("worker failed")
        connection.send(RuntimeError(type(error).__name__))
    # Without a farewell: threads of a predict call may still be at work.
    os._exit(0)


async def _carry_out(connection: Connection, assignment: Assignment) -> dict[int, int]:
    settings, plan = assignment.settings, assignment.task.plan
    sizes = ChunkSize(plan.chunk_rows, most_bytes=settings.chunk_bytes)
    shrink = partial(asyncio.get_running_loop().call_soon_threadsafe, sizes.shrink)
    threading.Thread(target=_listen, args=(connection, shrink), daemon=True).start()
    async with open_clients(settings) as clients:
        estimator = await load_estimator(
            clients.objects, assignment.blob, assignment.metadata, pinned=True
        )
        predictor = replace(assignment.task.predictor, estimator=estimator)
        task = replace(assignment.task, predictor=predictor)
        means = Means(
            api=clients.storage,
            settings=settings,
            limiter=anyio.CapacityLimiter(1),
            sizes=sizes,
            threads=Threads(1),
            progress=connection.send,
        )

        streams = [shard.source for shard in assignment.shards]
        async with reading(clients.storage, task.session, streams, settings) as sources:
            return await run_shards(assignment.shards, sources, task, means)


def _listen(connection: Connection, shrink: Callable[[], object]) -> None:
    """Does what the parent says, and ends the process when the parent is gone."""
    while True:
        try:
            connection.recv()
        except (EOFError, OSError):
            os._exit(1)
        with suppress(RuntimeError):  # The run is over, and its loop closed.
            shrink()
