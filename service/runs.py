"""The runs of this process: admitted, watched and ended."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import anyio
import anyio.lowlevel
import structlog
from anyio.abc import TaskGroup

from mlsys.errors import (
    MlsysError,
    OutOfMemory,
    RunMismatch,
    TooManyRuns,
    Unavailable,
    UnderWay,
)
from service.contract import PredictRequest, PredictResult, ProgressEvent
from service.memory import Memory, told

_log = structlog.get_logger(__name__)

# How often memory is looked at while runs are under way, and what is beside it tidied up.
_LOOK_SECONDS = 0.025
_TIDY_SECONDS = 1.0
# What memory has to get less, before the same is done about it again.
_RELIEF_SECONDS = 0.25
_END_SECONDS = 1.0
# For how long a run that was ended is waited for, until what it held is given back.
_TIDY_UP_SECONDS = 5.0


class _Cancelled(Unavailable):
    """Somebody wanted the run to end."""


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
        # Makes the run hold less memory; False where it can't hold less. None: not known how.
        self.relieve: Callable[[], bool] | None = None
        self._ending: MlsysError | None = None
        self._clock = time.monotonic()
        self._scope = anyio.CancelScope()

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others: each environment has ids of its own."""
        return self.request.env, self.id

    def begin(self, rows_total: int | None, rows_done: int = 0) -> None:
        """Takes note that the run is ours and rows begin to move; of some it may be known."""
        self.rows_total, self.rows_done = rows_total, rows_done
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
        """Ends the run, unless it has ended. Its rows stay invisible, unless it commits already.

        It is not told as a failure: nobody has to get up for it.
        """
        told = "Nothing was written."
        if not self.begun.is_set():  # An earlier call may have written its rows.
            told = f"Ask again with run_id={self.id}: that never writes twice."
        self.end(because, _Cancelled(f"The run ended: {because}. {told}"))

    def end(self, because: str, error: MlsysError) -> None:
        """As `cancel`, with the error that its caller is to have."""
        if self.ended.is_set():
            return
        _log.info("run told to end", run_id=self.id, because=because)
        self.ended_because, self._ending = because, error
        self._scope.cancel()

    @property
    def ending(self) -> MlsysError:
        """What whoever asks for the run is told where it was ended."""
        return self._ending or Unavailable(
            f"The run was ended. Ask again with run_id={self.id}: that never writes twice.",
            run_id=self.id,
        )

    async def carry_out(
        self,
        work: Callable[[Run], Awaitable[PredictResult]],
        tidy_up: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint,
    ) -> None:
        """Awaits `work`, and keeps its result or its error; `tidy_up` where it was ended."""
        try:
            with self._scope:
                self.result = await work(self)
                _log.info("run succeeded", **self.result.model_dump(include={"rows", "seconds"}))
            if self._scope.cancelled_caught:
                self._fail(self.ending)
                await tidy_up()
        except Exception as error:
            self._fail(error)
        finally:
            if self.result is None and self.error is None:
                # As the process ends; or, which nothing here should do, by a stray cancellation.
                _log.warning("run cancelled from without", run_id=self.id)
                self.error = self.ending
            self.begun.set()
            self.ended.set()

    def _fail(self, error: Exception) -> None:
        self.error = error
        if isinstance(error, _Cancelled):
            _log.info("run ended", because=self.ended_because)
        elif isinstance(error, MlsysError):
            _log.warning("run failed", error=type(error).__name__, detail=str(error))
        else:
            _log.error("run failed", exc_info=error)


class Runs:
    """The runs under way in this process.

    Args:
        most: how many may be at once.
        memory: what they have to fit into; None: there is enough.
        spare: lets go of what the process keeps without need.
    """

    def __init__(
        self,
        tasks: TaskGroup,
        most: int,
        memory: Memory | None = None,
        *,
        spare: Callable[[], None] = lambda: None,
    ) -> None:
        self._tasks = tasks
        self._most = most
        self._memory = memory
        self._spare = spare
        self._under_way: dict[tuple[str, str], Run] = {}
        self._idle_bytes = 0
        self._watched = False

    def start(
        self, request: PredictRequest, work: Callable[[Run], Awaitable[PredictResult]]
    ) -> Run:
        """Starts a run that goes on by itself until it ends or is cancelled.

        Raises:
            UnderWay: the run is under way here.
            RunMismatch: a run of that id is under way here, with other parameters.
            TooManyRuns: as many as may be are under way, or there is no room in memory beside
                those that are.
        """
        run = Run(request)
        if (there := self._under_way.get(run.key)) is not None:
            if there.request != request:
                raise RunMismatch.of(run.id)
            raise UnderWay(
                f"The run {run.id} is under way. Ask for it again, or use another run_id."
            )
        if len(self._under_way) >= self._most:
            raise TooManyRuns(
                f"This instance already has {self._most} runs under way. Try again later."
            )
        if self._memory is not None:
            self._check_room(self._memory)
        self._under_way[run.key] = run
        if self._memory is not None and not self._watched:
            self._watched = True
            self._tasks.start_soon(self._watch, self._memory, name="watch over memory")
        structlog.contextvars.bind_contextvars(run_id=run.id)
        self._tasks.start_soon(self._keep, run, work, name=f"run {run.id}")
        return run

    async def _keep(self, run: Run, work: Callable[[Run], Awaitable[PredictResult]]) -> None:
        # The task ends here in any case. A cancellation that was meant for another, and came by way
        # of something that both awaited, would end the runs of all.
        with suppress(anyio.get_cancelled_exc_class()):
            try:
                await run.carry_out(work, self._tidy_up)
            finally:
                del self._under_way[run.key]

    async def _tidy_up(self) -> None:
        # Before the caller is told that there was no room, and sends a smaller run. A predict call
        # that was under way is not to be interrupted, and holds what it has until it ends.
        memory = self._memory
        with anyio.move_on_after(_TIDY_UP_SECONDS):
            while memory is not None and memory.used() > memory.budget:
                await memory.release()
                await anyio.sleep(_RELIEF_SECONDS)

    def _check_room(self, memory: Memory) -> None:
        """A run that is alone may always begin: smaller than that the instance can't get."""
        count, used = len(self._under_way), memory.used()
        if not count:
            self._idle_bytes = used
            return
        # One that has just begun is yet to take what it needs.
        expected = max(used, self._idle_bytes + count * memory.run_bytes) + memory.run_bytes
        if expected > memory.budget:
            raise TooManyRuns(
                f"This instance has {told(memory.limit)} of memory, which is too little for "
                f"another run beside the {count} under way. Try again later."
            )

    async def _watch(self, memory: Memory) -> None:
        # What is seen concerns all runs, not the request that happened to come first.
        structlog.contextvars.clear_contextvars()
        watch = _Watch(memory, self._under_way, self._spare)
        while self._under_way:
            await watch.until_none_is_left()
        self._watched = False

    def cancel_all(self, because: str) -> None:
        """Ends every run under way."""
        for run in self._under_way.values():
            run.cancel(because)


class _Watch:
    """Keeps runs within memory: asks for less where it gets short, ends the newest before it ends.

    Args:
        runs: those under way, the newest last.
        spare: see `Runs`.
    """

    def __init__(
        self, memory: Memory, runs: Mapping[tuple[str, str], Run], spare: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._runs = runs
        self._spare = spare
        self._ask_at = self._end_at = -math.inf
        self._said = False

    async def until_none_is_left(self) -> None:
        """Watches for as long as there are runs."""
        if self._memory.used() > self._memory.budget:
            # What an earlier run has left behind is not the fault of this one.
            await self._memory.release()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tidy)
            while self._runs:
                self._look()
                await anyio.sleep(_LOOK_SECONDS)
            tasks.cancel_scope.cancel()

    async def _tidy(self) -> None:
        while True:
            await self._memory.look_below()
            if self._memory.used() > self._memory.budget:
                await self._memory.release()
            await anyio.sleep(_TIDY_SECONDS)

    def _look(self) -> None:
        used, now = self._memory.used(), time.monotonic()
        if used > self._memory.budget and now >= self._ask_at:
            self._ask_at = now + _RELIEF_SECONDS
            self._ask_for_less(used)
        if used > self._memory.brink and now >= self._end_at:
            self._end_at = now + _END_SECONDS
            self._end_newest(used)

    def _ask_for_less(self, used: int) -> None:
        self._spare()
        asked = [run.relieve() for run in self._runs.values() if run.relieve is not None]
        if any(asked) or not self._said:
            self._said = True
            _log.warning(
                "memory is short", used=used, limit=self._memory.limit, runs_with_less=sum(asked)
            )

    def _end_newest(self, used: int) -> None:
        left = [run for run in self._runs.values() if not run.ended_because]
        if not left:
            return
        error = OutOfMemory(
            f"The run ended: this instance has {told(self._memory.limit)} of memory, and "
            f"{told(used)} of it were in use. Nothing was written. Give the instance more memory, "
            "or ask for a smaller chunk_rows."
        )
        left[-1].end("memory ran out", error)
