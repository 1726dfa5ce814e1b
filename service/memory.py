"""The memory of this process and of those that it starts: how much there is, and is used.

    0 ─────────── budget ───── brink ── limit
      runs begin │ runs are   │ the newest
                 │ asked for  │ run ends
                 │ less       │

Past the limit the kernel kills the process, with all of its runs and without a word to any caller.
Where there is no `/proc`, use is taken to be nothing: runs are then admitted by what they are
expected to take, and nobody watches.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
from collections import defaultdict

import anyio
import anyio.to_thread
import pyarrow as pa

from mlsys.settings import Settings

MIB = 2**20

# Shares of the limit. Above the budget there is still room for what is under way to get smaller;
# above the brink, for a sample to come late: a run may take some MiB in each millisecond.
_BUDGET, _BRINK = 0.8, 0.92

# The limit of the container, by version 2 and 1 of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Of glibc's mallopt(3). By itself it gives back at once what is freed at the end of its memory, and
# has the kernel clear as many pages for the next block: buffers of a megabyte do so thousands of
# times in a run. Up to so many bytes stay, and blocks up to that size are made of them. They stay
# where they were freed, in the arena of their thread: so all that start from now on share one.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES, _LARGEST_KEPT_BYTES = 64 * MIB, 32 * MIB
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PSS = re.compile(rb"^Pss:\s+(\d+) kB$", re.M)
_VM_HWM = re.compile(rb"^VmHWM:\s+(\d+) kB$", re.M)


class Memory:
    """What this process may use, and what it does use.

    Args:
        limit: in bytes; None: what the container or else the machine has.
        run_bytes: what a run is expected to take.
    """

    def __init__(self, limit: int | None, run_bytes: int) -> None:
        self.limit = limit or _limit()
        self.run_bytes = run_bytes
        self._below: dict[int, int] = {}
        self._peak = 0
        self._left_alone = False
        # One thread, so that what tidies up never waits for what predicts.
        self._limiter = anyio.CapacityLimiter(1)

    @classmethod
    def of(cls, settings: Settings) -> Memory:
        """As the settings have it."""
        return cls(settings.memory_limit_bytes, settings.run_memory_bytes)

    @property
    def budget(self) -> int:
        """What may be used without anybody being asked for less, in bytes."""
        return int(self.limit * _BUDGET)

    @property
    def brink(self) -> int:
        """What may be used without a run being ended, in bytes."""
        return int(self.limit * _BRINK)

    def used(self) -> int:
        """Bytes in use now by this process, and by those below it as they were found last."""
        used = _resident("self") + sum(
            held for process, held in self._below.items() if _resident(process)
        )
        self._peak = max(self._peak, used)
        return used

    def peak_since_reset(self) -> int:
        """The most that was in use, at any look at it, since this was asked last."""
        used = self.used()
        peak, self._peak = self._peak, used
        return peak

    def fits(self, size: int) -> bool:
        """Whether there is room for so many bytes more."""
        return self.used() + size <= self.budget

    async def look_below(self) -> None:
        """Looks at the processes below this one, off the event loop: there may be many to ask."""
        self._below = await anyio.to_thread.run_sync(_held_below, limiter=self._limiter)

    def leave_alone(self) -> None:
        """Has Python look for no garbage in what there is by now, but where `release` is called."""
        self._left_alone = True
        gc.freeze()

    async def release(self) -> None:
        """Gives back to the system what nobody needs any more, off the event loop."""
        await anyio.to_thread.run_sync(_release, self._left_alone, limiter=self._limiter)


def reuse_memory() -> None:
    """Has this process use again what it has freed; once, before it holds much.

    Where there is neither jemalloc nor glibc, there is nothing to tell.
    """
    # Arrow wants its blocks aligned. In glibc's heap they leave holes that are a little too small
    # for the next, and a long run takes ever more; jemalloc keeps them apart, by their size.
    if "jemalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.jemalloc_memory_pool())
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)


def told(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / MIB:,.0f} MiB"


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once (its resident set)."""
    # Where Linux tells it: getrusage counts in what the process that started this one held.
    if sys.platform == "linux" and (hwm := _VM_HWM.search(_read("/proc/self/status"))):
        return int(hwm[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _limit() -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * _PAGE
    # `max`, and in version 1 a number beyond all machines, say that there is none.
    limits = [int(said) for said in map(_read, _LIMITS) if said.strip().isdigit()]
    return min([machine, *limits])


def _resident(process: int | str) -> int:
    """Bytes that a process holds; 0 where it has ended."""
    pages = _read(f"/proc/{process}/statm").split()
    return int(pages[1]) * _PAGE if pages else 0


def _held_below() -> dict[int, int]:
    """Bytes that each process below this one holds; what several share is shared out among them.

    Workers are forks of one process, so they have most of their pages in common.
    """
    held = {}
    for process in _descendants():
        pss = _PSS.search(_read(f"/proc/{process}/smaps_rollup"))
        held[process] = int(pss[1]) * 1024 if pss else _resident(process)
    return held


def _descendants() -> frozenset[int]:
    """The processes below this one."""
    below: defaultdict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        # The name of the program, in parentheses, may hold anything.
        if name.isdigit() and (stat := _read(f"/proc/{name}/stat").rpartition(b") ")[2].split()):
            below[int(stat[1])].append(int(name))
    found, left = set(), [os.getpid()]
    while left:
        children = below[left.pop()]
        found.update(children)
        left += children
    return frozenset(found)


def _release(left_alone: bool) -> None:
    # What was cancelled leaves exceptions behind that hold on to all that it had. A run that was
    # under way when what there is was left alone is among that.
    if left_alone:
        gc.unfreeze()
    gc.collect()
    if left_alone:
        gc.freeze()
    pa.default_memory_pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it.
        trim(0)


def _read(path: str) -> bytes:
    """A file of the kernel's: out of its memory, so this never waits. Empty where there is none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(file, 65_536)
    except OSError:
        return b""  # A process that has ended meanwhile.
    finally:
        os.close(file)
