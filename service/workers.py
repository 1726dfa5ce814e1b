"""Predict calls in processes of their own, for models that hold Python's interpreter.

A worker is forked from a server process that has imported what predicting needs and nothing else:
it starts in no time, and shares those pages with the others. It loads the very generation of the
model that the run has, and is given one chunk after the other. Reading and appending stay where
they are: next to what such a model takes for a row, to hand the row over is nothing.

Whatever happens to a worker happens before anything is visible. It ends as soon as its parent does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import anyio
import anyio.to_thread
import pyarrow as pa
import structlog

from mlsys.clients import open_clients
from mlsys.errors import MlsysError, Unavailable
from mlsys.gcs import Blob
from mlsys.metadata import ModelMetadata
from mlsys.settings import Settings
from service.logs import configure_logging, log_retries
from service.memory import reuse_memory
from service.model import load_estimator
from service.plan import Plan
from service.predict import Blame, Predict, Predicted, Predictor, Work
from service.threads import Threads

_log = structlog.get_logger(__name__)

# What a worker was seen to hold, with its share of what it has in common with others (its PSS), and
# with its part of the server.
WORKER_BYTES = 190 * 2**20

_END_SECONDS = 5


@dataclass(frozen=True)
class Assignment:
    """All that a worker is told. The predictor has no estimator: the worker loads it."""

    plan: Plan
    predictor: Predictor
    schema: pa.Schema
    blob: Blob
    metadata: ModelMetadata
    settings: Settings


@asynccontextmanager
async def in_processes(assignment: Assignment, count: int) -> AsyncIterator[Predict]:
    """Has chunks predicted by so many processes, for as long as the block lasts.

    `predict` waits for a process that has nothing to do. Beside what the model raises it raises
    Unavailable, where a process ended, and whatever loading the model raises.
    """
    bare = replace(assignment, predictor=replace(assignment.predictor, estimator=None))
    workers = [_Worker(bare) for _ in range(count)]
    idle, free = deque(workers), anyio.Semaphore(count, fast_acquire=True)

    async def predict(rows: pa.Table) -> Predicted:
        async with free:
            worker = idle.popleft()
            try:
                return await worker.predict(rows)
            finally:
                idle.append(worker)

    try:
        yield predict
    finally:
        for worker in workers:
            await worker.end()


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.workers", "sklearn.pipeline", "pandas"])
    return context


class _Worker:
    """A process, started with the first chunk that it gets."""

    def __init__(self, assignment: Assignment) -> None:
        self._ours, self._theirs = _context().Pipe()
        arguments = (self._theirs, assignment)
        self._process = _context().Process(target=_main, args=arguments, daemon=True)
        # It waits for as long as a call lasts.
        self._limiter = anyio.CapacityLimiter(1)

    async def predict(self, rows: pa.Table) -> Predicted:
        """One call at a time. One that is cancelled leaves the worker for nothing but its end."""
        if self._process.pid is None:
            await anyio.to_thread.run_sync(self._process.start)
            self._theirs.close()
            _log.info("worker started", pid=self._process.pid)
            await self._call(partial(_hear, self._ours))
        return await self._call(partial(_exchange, self._ours, rows))

    async def _call[T](self, call: Callable[[], T]) -> T:
        try:
            return await anyio.to_thread.run_sync(
                call, limiter=self._limiter, abandon_on_cancel=True
            )
        except (EOFError, OSError):
            await self.end()
            raise Unavailable(
                f"A process of this run ended (exit status {self._process.exitcode}). Nothing was "
                "written. If it ends so again, give the service more memory."
            ) from None

    async def end(self) -> None:
        """Sees it to its end; there is nothing in it that would be lost."""
        with anyio.CancelScope(shield=True):
            if self._process.pid is not None:
                self._process.kill()
                await anyio.to_thread.run_sync(self._process.join, _END_SECONDS)


def _exchange(worker: Connection, rows: pa.Table) -> Predicted:
    _send_rows(worker, rows.schema, rows.to_batches())
    cost = _hear(worker)
    return Predicted(_receive_rows(worker), cost)


def _hear(worker: Connection) -> Any:
    match worker.recv():
        case BaseException() as error:
            raise error
        case told:
            return told


def _send_rows(
    connection: Connection, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    connection.send_bytes(sink.getvalue())


def _receive_rows(connection: Connection) -> list[pa.RecordBatch]:
    return list(pa.ipc.open_stream(pa.py_buffer(connection.recv_bytes())))


def _main(parent: Connection, assignment: Assignment) -> None:
    """What a worker does, from its fork to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reuse_memory()
    configure_logging()
    log_retries()
    structlog.contextvars.bind_contextvars(run_id=assignment.plan.run_id)
    try:
        work = anyio.run(_work, assignment)
        parent.send("ready")
        _answer(parent, work, assignment.schema)
    except MlsysError as error:
        parent.send(error)
    except (EOFError, OSError):
        pass  # The parent asks no more.
    except Exception as error:
        _log.exception("worker failed")
        parent.send(RuntimeError(type(error).__name__))
    os._exit(0)


async def _work(assignment: Assignment) -> Work:
    async with open_clients(assignment.settings) as clients:
        estimator = await load_estimator(
            clients.objects, assignment.blob, assignment.metadata, pinned=True
        )
    predictor = replace(assignment.predictor, estimator=estimator)
    return Work(predictor, assignment.plan, assignment.schema, Threads(1))


def _answer(parent: Connection, work: Work, schema: pa.Schema) -> None:
    """Predicts whatever comes, until the parent goes."""
    while True:
        rows = pa.Table.from_batches(_receive_rows(parent))
        try:
            predicted = work(rows)
        except Blame as blame:
            parent.send(blame)
            continue
        parent.send(predicted.cost)
        _send_rows(parent, schema, predicted.batches)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
