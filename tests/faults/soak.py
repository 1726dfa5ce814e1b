"""Schedules by fresh seeds for as long as asked, and what they came to: `make soak DURATION=1800`.

python -m tests.faults.soak --seconds 1800 --report soak.json
python -m tests.faults.soak --seed 1234567
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlsys.local import local_servers
from tests.conftest import open_cloud
from tests.faults.rig import JOURNALLED, ROWS, Launcher, Rig, open_launcher, open_rig
from tests.faults.schedule import Life, schedule_of, undisturbed

# The local servers keep all that they were ever given, so they are started anew now and then.
_RUNS_A_ROUND = 200
_SAY_SECONDS = 30


@dataclass(frozen=True)
class Failure:
    """A schedule that did not end well, and the seed that replays it."""

    seed: int
    schedule: str
    error: str


@dataclass
class Report:
    """What a soak has come to; rows are those that are there once, as they should be."""

    journalled: bool = JOURNALLED
    seconds: float = 0
    runs: int = 0
    calls: int = 0
    rows: int = 0
    lost: int = 0
    duplicated: int = 0
    unexpected: int = 0
    kills: int = 0
    peak_memory_bytes: int = 0
    faults_by_kind: Counter[str] = field(default_factory=Counter)
    faults_by_call: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def told(self) -> str:
        """The figures in one line."""
        return (
            f"{self.seconds:,.0f} s: {self.runs:,} runs, {self.rows:,} rows, "
            f"{self.faults_by_kind.total():,} faults, {self.kills:,} kills, {self.lost:,} lost, "
            f"{self.duplicated:,} duplicated, {len(self.failures):,} failures"
        )


def soak(seeds: Iterable[int], seconds: float) -> Report:
    """Lives through the schedules of these seeds, for so many seconds at most."""
    report, begin, said = Report(), time.monotonic(), 0.0
    with (
        tempfile.TemporaryDirectory(prefix="mlsys-soak-") as place,
        open_launcher(Path(place) / "services.log") as launcher,
    ):
        for some in itertools.batched(_until(begin + seconds, seeds), _RUNS_A_ROUND):
            with _fresh_rig(launcher) as rig:
                counts = undisturbed(rig)
                for seed in _until(begin + seconds, some):
                    _live(rig, report, counts, seed)
                    report.seconds = round(time.monotonic() - begin, 1)
                    if report.seconds - said >= _SAY_SECONDS:
                        said = report.seconds
                        print(report.told(), flush=True)
    return report


def _until(end: float, seeds: Iterable[int]) -> Iterator[int]:
    return itertools.takewhile(lambda _: time.monotonic() < end, seeds)


@contextmanager
def _fresh_rig(launcher: Launcher) -> Iterator[Rig]:
    with (
        local_servers() as servers,
        open_cloud(servers.settings()) as cloud,
        open_rig(servers, cloud, launcher, instances=2) as rig,
    ):
        yield rig


def _live(rig: Rig, report: Report, counts: dict[str, int], seed: int) -> None:
    """Lives through one schedule and adds what came of it."""
    schedule = schedule_of(seed, counts)
    life = Life(rig, schedule)
    kills = sum(instance.kills for instance in rig.instances)
    error = ""
    try:
        life.live()
    except Exception as raised:  # Whatever it is: the seed is told, and the next one begins.
        error = f"{type(raised).__name__}: {raised}"
    report.runs += 1
    report.kills += sum(instance.kills for instance in rig.instances) - kills
    for fault in itertools.chain.from_iterable(plan.injected for plan in life.plans):
        report.faults_by_kind[fault.kind] += 1
        report.faults_by_call[fault.call] += 1
    report.calls += sum(plan.counts.total() for plan in life.plans)
    _count_rows(rig, report, life.wanted)
    if error:
        report.failures.append(Failure(seed, str(schedule), error))
        print(f"FAILED {schedule}\n  {error}", file=sys.stderr, flush=True)
        for instance in rig.instances:
            instance.tell(signal.SIGKILL)
    else:
        peaks = [instance.peak_memory() for instance in rig.instances]
        report.peak_memory_bytes = max(report.peak_memory_bytes, *peaks)


def _count_rows(rig: Rig, report: Report, wanted: dict[str, str]) -> None:
    figures = rig.look(wanted)
    report.rows += ROWS - figures.lost
    report.lost += figures.lost
    report.duplicated += figures.duplicated
    report.unexpected += figures.unexpected


def main() -> int:
    """Soaks as the command line says; the exit status is 1 where anything failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=1800, help="how long, at most")
    options.add_argument("--seed", type=int, action="append", help="live through this one only")
    options.add_argument("--report", type=Path, help="where the figures go, as JSON")
    chosen = options.parse_args()
    report = soak(chosen.seed or _fresh_seeds(), chosen.seconds)
    figures = json.dumps(vars(report) | {"failures": list(map(asdict, report.failures))}, indent=2)
    print(figures)
    if chosen.report:
        chosen.report.write_text(figures + "\n")
    for failure in report.failures:
        print(f"Replay it: python -m tests.faults.soak --seed {failure.seed}", file=sys.stderr)
    return 1 if report.failures or report.lost or report.duplicated or report.unexpected else 0


def _fresh_seeds() -> Iterator[int]:
    while True:
        yield random.randrange(2**32)


if __name__ == "__main__":
    sys.exit(main())
