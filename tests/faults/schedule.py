"""Random schedules: what goes wrong in the life of one run id, all of it from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

from tests.faults.plan import KILLS, Fault, Kind
from tests.faults.rig import LEASE_SECONDS, Instance, Rig, Story

RPC_KINDS = (
    Kind.REFUSED,
    Kind.BUSY,
    Kind.CUT,
    Kind.GOAWAY,
    Kind.LOST,
    Kind.CUT_APPLIED,
    Kind.DELAYED,
)
HTTP_KINDS = (
    Kind.REFUSED,
    Kind.BUSY,
    Kind.CUT,
    Kind.LOST,
    Kind.TRUNCATED,
    Kind.DELAYED,
)
# What matters most to a run that writes once: its commit, and its journal.
_TELLING = ("FinalizeWriteStream", "BatchCommitWriteStreams", "runs.")
_KILL_CHANCE = 0.4
_TWIN_CHANCE = 0.2
_MOST_FAULTS = 3


def kinds_of(call: str) -> Sequence[Kind]:
    """What may happen to a call of that name, apart from kills."""
    if call == "BatchCommitWriteStreams":
        return (*RPC_KINDS, Kind.GONE)
    return HTTP_KINDS if "." in call and call.partition(".")[0].islower() else RPC_KINDS


@dataclass(frozen=True)
class Schedule:
    """One run id's troubles.

    `faults` are by instance; `order` is where its calls go, one after the other; with `twins`, two
    clients call with it at once.
    """

    seed: int
    faults: tuple[tuple[Fault, ...], ...]
    order: tuple[int, ...]
    twins: bool

    def __str__(self) -> str:
        told = "; ".join(
            f"{fault} of instance {number}"
            for number, faults in enumerate(self.faults)
            for fault in faults
        )
        twins = ", called twice at once" if self.twins else ""
        return f"seed {self.seed}: {told}{twins}"


def schedule_of(seed: int, counts: Mapping[str, int], instances: int = 2) -> Schedule:
    """The schedule of a seed; `counts` says how often an undisturbed run makes each call."""
    chance = random.Random(seed)
    faults: list[list[Fault]] = [[] for _ in range(instances)]
    for _ in range(chance.randint(1, _MOST_FAULTS)):
        faults[chance.randrange(instances)].append(_fault(chance, counts))
    while chance.random() < _KILL_CHANCE:
        # The first to be called has something to do for sure.
        faults[0].append(_kill(chance, counts))
    order = [0, *(chance.randrange(instances) for _ in range(7))]
    twins = chance.random() < _TWIN_CHANCE
    return Schedule(seed, tuple(map(tuple, faults)), tuple(order), twins)


def _fault(chance: random.Random, counts: Mapping[str, int]) -> Fault:
    call = _call(chance, counts)
    return Fault(call, chance.randint(1, counts[call]), chance.choice(kinds_of(call)))


def _kill(chance: random.Random, counts: Mapping[str, int]) -> Fault:
    call = _call(chance, counts)
    kind = chance.choice(sorted(KILLS))
    # A call that is applied late may be so after another instance has taken over.
    return Fault(call, chance.randint(1, counts[call]), kind, chance.uniform(0, 2 * LEASE_SECONDS))


def _call(chance: random.Random, counts: Mapping[str, int]) -> str:
    names = sorted(counts)
    weights = [3 if name.startswith(_TELLING) else 1 for name in names]
    return chance.choices(names, weights)[0]


class Life:
    """One run id, from its first call to its last, through the faults of a schedule."""

    def __init__(self, rig: Rig, schedule: Schedule) -> None:
        self._rig = rig
        self._schedule = schedule
        self.wanted = rig.wanted()
        self.plans = [
            instance.follow(faults)
            for instance, faults in zip(rig.instances, schedule.faults, strict=True)
        ]

    def live(self) -> None:
        """Repeats the call until it is answered 200, and once more; checks that it wrote once.

        The answer to the last call, which nothing disturbs, is the one that was given before.
        """
        stories = self._call()
        self._rig.settle()
        for instance in self._rig.instances:
            instance.follow(())
        stories.append(self._rig.until_done(self.wanted))
        figures = self._rig.look(self.wanted)
        told = (str(self._schedule), figures, [story.answers for story in stories])
        assert figures.once, told
        assert all(story.result == stories[0].result for story in stories), told

    def _call(self) -> list[Story]:
        clients = 2 if self._schedule.twins else 1
        with ThreadPoolExecutor(clients) as pool:
            calls = [
                pool.submit(self._rig.until_done, self.wanted, choose=self._in_order(start))
                for start in range(clients)
            ]
        return [call.result() for call in calls]

    def _in_order(self, start: int) -> Callable[[], Instance]:
        turns = cycle(self._schedule.order[start:] + self._schedule.order[:start])
        return lambda: self._rig.instances[next(turns)]


def undisturbed(rig: Rig) -> dict[str, int]:
    """How often a run makes each call where nothing fails."""
    for instance in rig.instances:
        instance.follow(())
        rig.until_done(rig.wanted(), choose=lambda instance=instance: instance)
    return dict(rig.instance.plan.counts)
