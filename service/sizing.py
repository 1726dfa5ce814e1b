"""How many rows a predict call gets: enough that its fixed cost is small, and no more than that.

A call of a model costs something however few rows it gets, and so does a chunk on its way to the
call and from it. So chunks grow while a call is short, and further while larger ones cost less a
row. They stop where that pays no more, where a call takes long (it can't be interrupted, and
progress comes between calls), or where a chunk holds many bytes. What that comes to for which model
is measured by `benchmarks/chunk_sizes.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Where growth begins: a scikit-learn pipeline's fixed cost, about a millisecond, is shared by this
# many rows, and the most expensive of models answers for them within seconds.
FIRST_ROWS = 2048
# Below this, chunks are not what takes the memory.
FEWEST_ROWS = 64
# A size is judged by the cheapest of so many calls, or by the first that is short.
_CALLS = 3
# Larger chunks have to cost this much less a row: each doubling also doubles what is in memory.
_WORTH = 0.95
# How often they may fail to, one after the other: a core that others use as well slows down by more
# than that from one moment to the next.
_MISSES = 2
# What takes a chunk from stage to stage, reads its rows and sends them costs a few milliseconds a
# chunk, which no call sees. It hardly counts beside a call of so many seconds on a core. Shorter
# calls say little besides: on a shared core one was seen to take 0.8 to 1.2 times another.
_SHORT_SECONDS = 0.2
_LONGEST_SECONDS = 1.0
# By how much chunks grow at once at most.
_STEP = 8
# In place of a time that is too short to be measured.
_TICK = 1e-9


@dataclass(frozen=True)
class Cost:
    """What a predict call took: seconds by the clock, and those of its thread on a core.

    The latter say what a row costs, also where other threads and processes are at work.
    """

    seconds: float
    on_core: float


class ChunkSize:
    """The rows of the next chunk, for all shards of a run.

    Args:
        rows: as many as the caller asked for; None: it is to be found out.
        most_bytes: of a chunk whose size is found out.

    `settled` is whether chunks grow no more.
    """

    def __init__(self, rows: int | None = None, *, most_bytes: int) -> None:
        self.rows = rows or FIRST_ROWS
        self.settled = rows is not None
        self._most_bytes = most_bytes
        self._best_rows, self._best = self.rows, math.inf
        self._quickest = self._soonest = math.inf
        self._calls = self._misses = 0

    def learn(self, rows: int, cost: Cost, size: int) -> None:
        """Takes note of a call: its rows, what it cost, and the bytes of its chunk."""
        if self.settled or rows != self.rows:
            return
        self._quickest = min(self._quickest, cost.on_core / rows)
        self._soonest = min(self._soonest, cost.seconds)
        self._calls += 1
        short = self._quickest * rows < _SHORT_SECONDS
        times = self._room(rows, size, short)
        if self._calls < _CALLS and (times < 2 or not short):
            return
        if short or self._quickest <= _WORTH * self._best:
            self._best_rows, self._best, self._misses = rows, self._quickest, 0
        else:
            self._misses += 1
        if times < 2 or self._misses == _MISSES:
            self._settle(self._best_rows)
        else:
            self._quickest = self._soonest = math.inf
            self._calls = 0
            self.rows = times * rows

    def _room(self, rows: int, size: int, short: bool) -> int:
        """How many times as many rows the next calls may get, a power of 2; 1: no more."""
        times = min(_LONGEST_SECONDS / max(self._soonest, _TICK), self._most_bytes / max(size, 1))
        # To where calls are no longer short, in a few steps: what a model needs besides is unknown.
        steps = _SHORT_SECONDS / max(self._quickest * rows, _TICK) if short else 2
        return 2 ** int(math.log2(max(min(times, max(steps, 2), _STEP), 1)))

    def shrink(self) -> bool:
        """Halves the chunks from now on; False where they are as small as may be already."""
        if self.rows <= FEWEST_ROWS:
            return False
        self._settle(max(self.rows // 2, FEWEST_ROWS))
        return True

    def _settle(self, rows: int) -> None:
        self.rows, self.settled = rows, True
