"""Two instances, one run id: the one that slept commits nothing, and many callers are one run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.plan import Fault, Kind
from tests.faults.rig import LEASE_SECONDS, PATIENCE, Launcher, Rig, open_rig
from tests.faults.schedule import undisturbed

CALLERS = 20
# The call is applied at once, or only after the other instance has taken over.
SOON, LATE = 0.0, 2.5 * LEASE_SECONDS


@pytest.fixture(scope="module")
def rig(servers: LocalServers, cloud: Cloud, launcher: Launcher) -> Iterator[Rig]:
    with open_rig(servers, cloud, launcher, instances=2) as running:
        yield running


@pytest.fixture(scope="module")
def counts(rig: Rig) -> dict[str, int]:
    return undisturbed(rig)


@pytest.mark.parametrize("seconds", [SOON, LATE], ids=["applied-soon", "applied-late"])
@pytest.mark.parametrize(
    ("call", "last"),
    [
        ("CreateWriteStream", True),
        ("AppendRows.request", False),
        ("AppendRows.request", True),
        ("FinalizeWriteStream", False),
        ("FinalizeWriteStream", True),
        ("BatchCommitWriteStreams", True),
        ("runs.upload.running", False),
        ("runs.upload.prepared", False),
    ],
)
def test_an_instance_that_slept_past_its_lease_commits_nothing(
    rig: Rig, counts: dict[str, int], call: str, last: bool, seconds: float
) -> None:
    sleeper, other = rig.instances
    wanted = rig.wanted()
    fault = Fault(call, counts[call] if last else 1, Kind.STOPPED, seconds)
    plan = sleeper.follow([fault])
    other.follow(())
    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(sleeper.get, "/predict", **wanted)
        try:
            assert plan.happened.wait(PATIENCE), "it never slept"
            story = rig.until_done(wanted, choose=lambda: other)
            assert rig.look(wanted).once
        finally:
            sleeper.tell(signal.SIGCONT)
        answer = zombie.result(PATIENCE)

    rig.settle()
    figures = rig.look(wanted)
    assert figures.once, (str(fault), figures, story.answers)
    assert answer.status_code in {200, 409, 503}, answer.text
    # And whoever asks the sleeper again is told what the other did.
    again = rig.until_done(wanted, choose=lambda: sleeper)
    assert again.result == story.result
    assert rig.look(wanted).once


@pytest.mark.parametrize(
    "ended", [Kind.KILLED_APPLIED, Kind.KILLED], ids=["committed-before", "never-committed"]
)
def test_streams_that_are_gone_when_a_run_is_taken_over_are_no_reason_to_write_twice(
    rig: Rig, counts: dict[str, int], ended: Kind
) -> None:
    wanted, (owner, other) = rig.wanted(), rig.instances
    owner.follow([Fault("BatchCommitWriteStreams", 1, ended)])
    other.follow([Fault("BatchCommitWriteStreams", 1, Kind.GONE)])
    assert owner.get("/predict", **wanted) is None

    story = rig.until_done(wanted, choose=lambda: other)

    assert other.plan.injected, story.answers
    assert rig.look(wanted).once
    assert rig.until_done(wanted).result == story.result
    assert rig.look(wanted).once


def test_many_callers_with_one_run_id_are_one_run(rig: Rig, counts: dict[str, int]) -> None:
    wanted = rig.wanted()
    for instance in rig.instances:
        instance.follow(())
        instance.front.rows.commits.clear()
    turns = cycle(rig.instances)
    callers = [next(turns) for _ in range(CALLERS)]

    with ThreadPoolExecutor(CALLERS) as pool:
        calls = [
            pool.submit(rig.until_done, wanted, choose=lambda instance=instance: instance)
            for instance in callers
        ]
    stories = [call.result() for call in calls]

    assert rig.look(wanted).once
    assert all(story.result == stories[0].result for story in stories)
    commits = [done for each in rig.instances for _, done in each.front.rows.commits]
    assert commits == [True]
