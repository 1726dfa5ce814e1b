"""Random schedules of faults and kills: a run id writes once, whatever comes together.

`MLSYS_FAULT_SEED=… pytest tests/faults/test_schedules.py` replays the one of that seed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.rig import Launcher, Rig, open_rig
from tests.faults.schedule import Life, schedule_of, undisturbed

SCHEDULES = 50
REPLAYED = os.environ.get("MLSYS_FAULT_SEED")
SEEDS = [int(REPLAYED)] if REPLAYED else [random.randrange(2**32) for _ in range(SCHEDULES)]


@pytest.fixture(scope="module")
def rig(servers: LocalServers, cloud: Cloud, launcher: Launcher) -> Iterator[Rig]:
    with open_rig(servers, cloud, launcher, instances=2) as running:
        yield running


@pytest.fixture(scope="module")
def counts(rig: Rig) -> dict[str, int]:
    return undisturbed(rig)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed-{seed}")
def test_a_run_id_writes_once_through_faults_and_kills(
    rig: Rig, counts: dict[str, int], seed: int
) -> None:
    schedule = schedule_of(seed, counts)
    print(schedule)
    Life(rig, schedule).live()
