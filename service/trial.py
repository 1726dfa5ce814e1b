"""Whether a model needs processes, measured on the first rows of its table.

scikit-learn's compiled code lets go of Python's interpreter lock, so its calls share the cores as
threads. A model whose time goes into Python, a transformer of the user's own or a text vectorizer,
holds the lock: its calls take turns, however many threads there are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock, Thread

import anyio
import pyarrow as pa
import structlog

from service.predict import in_thread
from service.threads import Threads

_log = structlog.get_logger(__name__)

# How many times the seconds that they take to start processes have to save: they hold memory, too.
_PAYS_TIMES = 2
# Of fewer rows nothing is asked: they would have to take 20 µs each, which few models do.
_FEWEST_ROWS = 50_000
# A call that is timed takes at least this long, where there are rows enough, and so many times as
# long as one of a single row.
_CALL_SECONDS = 0.03
_MOSTLY_ROWS = 3
# Of a call that takes less than so many times as long, nothing is known of its rows.
_HALF_ROWS = 2
_FIRST_ROWS = 256
_KNOCK_SECONDS = 0.0005
_PUT_OFF_SECONDS = 1.0
# The switching is the process's: one trial at a time puts it off, and no other waits forever.
_putting_off = Lock()
_TURN_SECONDS = 5
# What a further thread has to bring, at least, in parts of a core.
_HELPS = 0.35


@dataclass(frozen=True)
class Trial:
    """What was measured: seconds a row, and the part of a call that others have the interpreter."""

    row_seconds: float
    shared: float

    def speedup(self, calls: int) -> float:
        """How many times as much so many threads do as one (Amdahl's law)."""
        return 1 / (1 - self.shared + self.shared / calls)

    def processes_pay(self, rows: int, calls: int, start_seconds: float) -> bool:
        """Whether `rows` rows are done sooner, start included, in as many processes as calls."""
        speedup = self.speedup(calls)
        saved = rows * self.row_seconds * (1 / speedup - 1 / calls)
        return speedup < 1 + _HELPS * (calls - 1) and saved > _PAYS_TIMES * start_seconds


async def interpreter_bound(
    predictor: Callable[[pa.Table], object],
    peek: Callable[[], Awaitable[pa.RecordBatch]],
    rows: int,
    *,
    limiter: anyio.CapacityLimiter,
    calls: int,
    start_seconds: float,
) -> bool:
    """Whether the model's calls hold the interpreter, and so much that processes pay.

    Args:
        peek: gives a batch to try the model on, which stays the next to be read.
        rows: in the table, at most.
        calls: that would run at once.
        start_seconds: what processes would take to start.
    """
    if rows < _FEWEST_ROWS:
        return False
    try:
        sample = pa.Table.from_batches([await peek()])
    except anyio.EndOfStream:
        return False
    # Of a run that takes less by itself, no processes could save as much.
    pays_seconds = _PAYS_TIMES * start_seconds
    trial = await in_thread(partial(_tried, predictor, sample, rows, pays_seconds), limiter)
    if trial is None:
        return False
    pays = trial.processes_pay(rows, calls, start_seconds)
    _log.info("model tried", interpreter_shared=round(trial.shared, 2), processes=pays)
    return pays


def _tried(
    predictor: Callable[[pa.Table], object], sample: pa.Table, rows: int, pays_seconds: float
) -> Trial | None:
    try:
        return _measure(predictor, sample, rows, pays_seconds)
    except BaseException:  # Whatever it is, the run itself finds the row and tells of it.
        return None


def _measure(
    predictor: Callable[[pa.Table], object], sample: pa.Table, rows: int, pays_seconds: float
) -> Trial | None:
    """Times calls of the model; None where nothing can be told, or the table is not worth it."""
    threads = Threads(1)
    chunk = sample.slice(0, 1)
    call = partial(threads.call, lambda: predictor(chunk))
    # What a call costs however few rows it gets is mostly Python, a forest's to start its trees for
    # instance, and hardly counts in the large chunks of a run. The first in a process also finds
    # out things for good, in scikit-learn 1.9 for 40 ms.
    fixed = min(_core_seconds(call), _core_seconds(call))
    enough = max(_CALL_SECONDS, _MOSTLY_ROWS * fixed)
    chunk = sample.slice(0, _FIRST_ROWS)
    while (seconds := _core_seconds(call)) < enough and chunk.num_rows < sample.num_rows:
        chunk = sample.slice(0, 4 * chunk.num_rows)
    if seconds >= enough:  # Or it was held up, as calls are where others use the machine as well.
        seconds = min(seconds, _core_seconds(call))
    row_seconds = (seconds - fixed) / chunk.num_rows
    if seconds < _HALF_ROWS * fixed or rows * row_seconds < pays_seconds:
        return None
    if not _putting_off.acquire(timeout=_TURN_SECONDS):
        _log.info("model not tried: another one is, and for long")
        return None
    try:
        return Trial(row_seconds, _shared(call))
    finally:
        _putting_off.release()


def _core_seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _shared(call: Callable[[], object]) -> float:
    """For which part of a call another thread can have the interpreter, from 0 to 1.

    A thread that asks for it again and again is let in only where the call lets go by itself, as
    Python's own switching is put off meanwhile. How often, against how often while nobody holds it:
    that compares well on a machine that others use too, where seconds by the clock do not.
    """
    knocks, done = 0, False

    def knock() -> None:
        nonlocal knocks
        while not done:
            time.sleep(_KNOCK_SECONDS)
            knocks += 1

    def rate(work: Callable[[], object]) -> float:
        before, start = knocks, time.perf_counter()
        while (seconds := time.perf_counter() - start) < _CALL_SECONDS:
            work()
        return (knocks - before) / seconds

    knocker, switching = Thread(target=knock), sys.getswitchinterval()
    knocker.start()
    sys.setswitchinterval(_PUT_OFF_SECONDS)
    try:
        free = rate(partial(time.sleep, _CALL_SECONDS))
        return min(rate(call) / free, 1.0) if free else 1.0
    finally:
        sys.setswitchinterval(switching)
        done = True
        knocker.join()
