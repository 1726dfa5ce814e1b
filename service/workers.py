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
from collections.abc import AsyncIterator, Callable
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
from service.sizing import Cost
from service.threads import Threads

_log = structlog.get_logger(__name__)

# What a worker was seen to hold, with its share of what it has in common with others (its PSS), and
# with its part of the server.
WORKER_BYTES = 190 * 2**20
# And times the size of the model's file, as each loads it: a vectorizer's words took that much.
WORKER_TIMES = 6

# What workers take to start: the first also wait for the server that they are forked from.
_FIRST_START_SECONDS = 2.0
_START_SECONDS = 0.5
_server_is_there = threading.Event()

_READY = "ready"
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


def start_seconds() -> float:
    """About how long it takes until workers that are started now predict."""
    return _START_SECONDS if _server_is_there.is_set() else _FIRST_START_SECONDS


@asynccontextmanager
async def in_processes(assignment: Assignment, count: int) -> AsyncIterator[Predict]:
    """Has chunks predicted by so many processes, for as long as the block lasts.

    `predict` waits for a process that has nothing to do. Beside what the model raises it raises
    Unavailable, where a process ended, and whatever loading the model raises.
    """
    bare = replace(assignment, predictor=replace(assignment.predictor, estimator=None))
    workers = [_Worker(bare) for _ in range(count)]
    idle, free = list(workers), anyio.Semaphore(count, fast_acquire=True)

    async def predict(rows: pa.Table) -> Predicted:
        async with free:
            # The last that was busy, so that none is started which is not needed.
            worker = idle.pop()
            try:
                return await worker.predict(rows)
            finally:
                idle.append(worker)

    try:
        yield predict
    finally:
        for worker in workers:
            worker.kill()
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
        # A call waits for as long as the model takes. It may be abandoned, and goes on for a while.
        self._limiter = anyio.CapacityLimiter(1)
        self._in_use = threading.Lock()

    async def predict(self, rows: pa.Table) -> Predicted:
        """One call at a time. One that is cancelled ends the process: its answer would be next."""
        try:
            if self._process.pid is None:
                await anyio.to_thread.run_sync(self._process.start)
                _server_is_there.set()
                self._theirs.close()
                _log.info("worker started", pid=self._process.pid)
                await self._call(partial(_hear, self._ours))
            return await self._call(partial(_exchange, self._ours, rows))
        except (EOFError, OSError):
            await self.end()
            raise Unavailable(
                f"A process of this run ended (exit status {self._process.exitcode}). Nothing was "
                "written. If it ends so again, give the service more memory."
            ) from None
        except anyio.get_cancelled_exc_class():
            await self.end()
            raise

    async def _call[T](self, call: Callable[[], T]) -> T:
        def alone() -> T:
            with self._in_use:
                return call()

        return await anyio.to_thread.run_sync(alone, limiter=self._limiter, abandon_on_cancel=True)

    def kill(self) -> None:
        """Ends it at once; there is nothing in it that would be lost."""
        if self._process.pid is not None:
            self._process.kill()

    async def end(self) -> None:
        """Sees it to its end."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._end)

    def _end(self) -> None:
        self.kill()
        if self._process.pid is not None:
            self._process.join(_END_SECONDS)
        # A call that was abandoned hears that its process has ended.
        if self._in_use.acquire(timeout=_END_SECONDS):
            self._ours.close()
            self._theirs.close()
            self._in_use.release()


def _exchange(worker: Connection, rows: pa.Table) -> Predicted:
    worker.send_bytes(_packed(rows))
    cost, data = _hear(worker)
    return Predicted(_unpacked(data).to_batches(), cost)


def _hear(worker: Connection) -> Any:
    match worker.recv():
        case BaseException() as error:
            raise error
        case told:
            return told


def _packed(rows: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue()


def _unpacked(data: bytes | pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


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
        _tell(parent, _READY)
        while True:
            _tell(parent, _answer(work, _asked(parent)))
    except MlsysError as error:
        _tell(parent, error)
    except Exception as error:
        _log.exception("worker failed")
        _tell(parent, RuntimeError(type(error).__name__))
    os._exit(0)


async def _work(assignment: Assignment) -> Work:
    async with open_clients(assignment.settings) as clients:
        estimator = await load_estimator(
            clients.objects, assignment.blob, assignment.metadata, pinned=True
        )
    predictor = replace(assignment.predictor, estimator=estimator)
    return Work(predictor, assignment.plan, assignment.schema, Threads(1))


def _asked(parent: Connection) -> bytes:
    try:
        return parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(0)  # Nothing more.


def _tell(parent: Connection, what: object) -> None:
    try:
        parent.send(what)
    except OSError:
        os._exit(0)  # Nobody listens.


def _answer(work: Work, data: bytes) -> tuple[Cost, pa.Buffer] | Blame:
    try:
        predicted = work(_unpacked(data))
    except Blame as blame:
        return blame
    return predicted.cost, _packed(pa.Table.from_batches(predicted.batches))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
