"""Random schedules of faults and kills: a run id writes once, whatever comes together.

`MLSYS_FAULT_SEED=… pytest tests/faults/test_schedules.py` replays the one of that seed.
"""

from __future__ import annotations

import os
import queue
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.rig import Launcher, Rig, open_rig
from tests.faults.schedule import Life, schedule_of, undisturbed

SCHEDULES = 50
# Two services each, that share the run ids of their schedules.
PAIRS = 3
REPLAYED = os.environ.get("MLSYS_FAULT_SEED")
SEEDS = [int(REPLAYED)] if REPLAYED else [random.randrange(2**32) for _ in range(SCHEDULES)]


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    """How often an undisturbed run makes each call; known once the services run."""
    return {}


@pytest.fixture(scope="module")
def lives(
    servers: LocalServers, cloud: Cloud, launcher: Launcher, counts: dict[str, int]
) -> Iterator[dict[int, Future[None]]]:
    """The life of each seed: a few at a time, since they wait most of theirs."""
    free: queue.SimpleQueue[Rig] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(PAIRS):
            rig = stack.enter_context(open_rig(servers, cloud, launcher, instances=2))
            counts.update(undisturbed(rig))
            free.put(rig)
        pool = stack.enter_context(ThreadPoolExecutor(PAIRS))
        yield {seed: pool.submit(live, free, counts, seed) for seed in SEEDS}
        pool.shutdown(cancel_futures=True)


def live(free: queue.SimpleQueue[Rig], counts: dict[str, int], seed: int) -> None:
    """Lives through the schedule of a seed, on services that are free."""
    rig = free.get()
    try:
        Life(rig, schedule_of(seed, counts)).live()
    finally:
        free.put(rig)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed-{seed}")
def test_a_run_id_writes_once_through_faults_and_kills(
    lives: dict[int, Future[None]], counts: dict[str, int], seed: int
) -> None:
    print(f"MLSYS_FAULT_SEED={seed} replays this: {schedule_of(seed, counts)}")
    lives[seed].result()
