"""The runs of this process: admitted, watched and ended."""

from __future__ import annotations

import math
import os
import re
import resource
import sys
import time
import uuid
from collections.abc import Awaitable, Callable

import anyio
import structlog
from anyio.abc import TaskGroup

from mlsys.errors import MlsysError, TooManyRuns, Unavailable, UnderWay
from service.contract import PredictRequest, PredictResult, ProgressEvent

_log = structlog.get_logger(__name__)

_VM_HWM = re.compile(rb"^VmHWM:\s+(\d+) kB$", re.M)


class Run:
    """One run, from its request to its result or its error."""

    def __init__(self, request: PredictRequest) -> None:
        self.id = request.run_id or uuid.uuid4().hex
        self.request = request
        self.begun = anyio.Event()
        self.ended = anyio.Event()
        self.result: PredictResult | None = None
        self.error: Exception | None = None
        self.rows_done = 0
        self.rows_total: int | None = None
        self.ended_because = ""
        self._clock = time.monotonic()
        self._scope = anyio.CancelScope()

    def begin(self, rows_total: int | None) -> None:
        """Takes note that the run is ours and rows begin to move."""
        self.rows_total = rows_total
        self.begun.set()

    def advance(self, rows: int) -> None:
        """Counts rows that BigQuery has acknowledged."""
        self.rows_done += rows

    def progress(self) -> ProgressEvent:
        """How far the run has come, this moment."""
        rate = self.rows_done / max(time.monotonic() - self._clock, 1e-9)
        left = None
        if self.rows_total is not None and self.rows_done:
            left = math.ceil(max((self.rows_total - self.rows_done) / rate, 0))
        return ProgressEvent(
            run_id=self.id,
            rows_done=self.rows_done,
            rows_total=self.rows_total,
            rows_per_second=round(rate, 1),
            seconds_left=left,
        )

    def cancel(self, because: str) -> None:
        """Ends the run, unless it has ended. Its rows stay invisible, unless it commits already."""
        if self.ended.is_set():
            return
        _log.info("run told to end", run_id=self.id, because=because)
        self.ended_because = because
        self._scope.cancel()

    async def carry_out(self, work: Callable[[Run], Awaitable[PredictResult]]) -> None:
        """Awaits `work`, and keeps its result or its error."""
        try:
            with self._scope:
                self.result = await work(self)
                _log.info("run succeeded", **self.result.model_dump(include={"rows", "seconds"}))
            if self._scope.cancelled_caught:
                self._fail(
                    Unavailable(f"The run ended: {self.ended_because}. Nothing was written.")
                )
        except Exception as error:
            self._fail(error)
        finally:
            self.begun.set()
            self.ended.set()

    def _fail(self, error: Exception) -> None:
        self.error = error
        if isinstance(error, MlsysError):
            _log.warning("run failed", error=type(error).__name__, detail=str(error))
        else:
            _log.error("run failed", exc_info=error)


class Runs:
    """The runs under way in this process, at most `most` at once."""

    def __init__(self, tasks: TaskGroup, most: int) -> None:
        self._tasks = tasks
        self._most = most
        self._under_way: dict[str, Run] = {}

    def start(
        self, request: PredictRequest, work: Callable[[Run], Awaitable[PredictResult]]
    ) -> Run:
        """Starts a run that goes on by itself until it ends or is cancelled.

        Raises:
            UnderWay: a run of that id is under way here.
            TooManyRuns: as many as may be are under way.
        """
        run = Run(request)
        if run.id in self._under_way:
            raise UnderWay(
                f"The run {run.id} is under way. Ask for it again, or use another run_id."
            )
        if len(self._under_way) >= self._most:
            raise TooManyRuns(
                f"This instance already has {self._most} runs under way. Try again later."
            )
        self._under_way[run.id] = run
        structlog.contextvars.bind_contextvars(run_id=run.id)
        self._tasks.start_soon(self._keep, run, work, name=f"run {run.id}")
        return run

    async def _keep(self, run: Run, work: Callable[[Run], Awaitable[PredictResult]]) -> None:
        try:
            await run.carry_out(work)
        finally:
            del self._under_way[run.id]

    def cancel_all(self, because: str) -> None:
        """Ends every run under way."""
        for run in self._under_way.values():
            run.cancel(because)


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once (its resident set)."""
    # Where Linux tells it: getrusage counts in what the process that started this one held.
    if sys.platform == "linux" and (told := _VM_HWM.search(_own_status())):
        return int(told[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _own_status() -> bytes:
    # Comes out of the kernel's memory, so it never waits.
    status = os.open("/proc/self/status", os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(status, 65_536)
    finally:
        os.close(status)
