"""Random schedules of faults and kills: a run id writes once, whatever comes together.

`MLSYS_FAULT_SEED=… pytest tests/faults/test_schedules.py` replays the one of that seed.
"""

from __future__ import annotations

import os
import queue
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.rig import Launcher, Rig, open_rig
from tests.faults.schedule import Life, schedule_of, undisturbed

SCHEDULES = 50
# Two services each, that share the run ids of their schedules. A few at a time, since a schedule
# waits most of its life: for a lease to run out, or for the next attempt.
PAIRS = 3
REPLAYED = os.environ.get("MLSYS_FAULT_SEED")


def test_a_run_id_writes_once_through_random_faults_and_kills(
    servers: LocalServers, cloud: Cloud, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = [int(REPLAYED)] if REPLAYED else [random.randrange(2**32) for _ in range(SCHEDULES)]
    with capsys.disabled():
        print(f"\nMLSYS_FAULT_SEED replays one of {seeds}")
    free: queue.SimpleQueue[Rig] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(PAIRS):
            rig = stack.enter_context(open_rig(servers, cloud, launcher, instances=2))
            counts = undisturbed(rig)
            free.put(rig)
        pool = stack.enter_context(ThreadPoolExecutor(PAIRS))
        told = list(pool.map(partial(what_goes_wrong, free, counts), seeds))

    wrong = [each for each in told if each]
    assert not wrong, "\n\n".join(wrong)


def what_goes_wrong(free: queue.SimpleQueue[Rig], counts: Mapping[str, int], seed: int) -> str:
    """Lives through the schedule of a seed on services that are free; tells what goes wrong."""
    schedule = schedule_of(seed, counts)
    rig = free.get()
    try:
        Life(rig, schedule).live()
    except Exception as error:  # Whatever it is, the seed that led there is to be told.
        return f"MLSYS_FAULT_SEED={seed} replays {schedule}\n{type(error).__name__}: {error}"
    finally:
        free.put(rig)
    return ""
