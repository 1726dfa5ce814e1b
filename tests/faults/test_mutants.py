"""The rig finds bugs: services with a step of the protocol left out write twice, and it tells."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.launcher import MUTANT
from tests.faults.plan import Fault, Kind
from tests.faults.rig import PATIENCE, ROWS, Figures, Launcher, Rig, open_rig
from tests.faults.schedule import undisturbed

AS_IT_IS = ""
# Fewer than so many looks at its record, and writes of it, are left to one that wakes up. Each
# takes longer than the third of a lease that a try of one has.
MOST_CALLS = 8
CALL_SECONDS = 1.0
JOURNAL = ("runs.upload", "runs.get_metadata", "runs.download")


def sleeps_past_its_lease(rig: Rig) -> Figures:
    """What is there when one that slept with all of its rows sent wakes up after a take-over."""
    sleeper, other = rig.instances
    finalized = undisturbed(rig)["FinalizeWriteStream"]
    wanted = rig.wanted()
    # Or it might find with the next renewal of its lease, before it commits, that the run is lost.
    slow = [
        Fault(call, nth, Kind.DELAYED, CALL_SECONDS)
        for call in JOURNAL
        for nth in range(1, MOST_CALLS)
    ]
    plan = sleeper.follow([Fault("FinalizeWriteStream", finalized, Kind.STOPPED, 0.0)])
    other.follow(())
    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(sleeper.get, "/predict", **wanted)
        try:
            assert plan.happened.wait(PATIENCE), "it never slept"
            sleeper.follow(slow)
            rig.until_done(wanted, choose=lambda: other)
            assert rig.look(wanted).once
        finally:
            sleeper.tell(signal.SIGCONT)
        assert zombie.result(PATIENCE) is not None
    rig.settle()
    return rig.look(wanted)


def finds_its_streams_gone(rig: Rig) -> Figures:
    """What is there when a run is taken over whose streams are gone, but were committed."""
    wanted, (owner, other) = rig.wanted(), rig.instances
    owner.follow([Fault("BatchCommitWriteStreams", 1, Kind.KILLED_APPLIED)])
    other.follow([Fault("BatchCommitWriteStreams", 1, Kind.GONE)])
    assert owner.get("/predict", **wanted) is None
    rig.until_done(wanted, choose=lambda: other)
    return rig.look(wanted)


SCENARIOS = {
    "without-fence": sleeps_past_its_lease,
    "gone-is-not-committed": finds_its_streams_gone,
}


@pytest.mark.parametrize("mutant", SCENARIOS)
def test_a_mutant_is_found_where_the_service_writes_once(
    servers: LocalServers, cloud: Cloud, launcher: Launcher, mutant: str
) -> None:
    def figures(kind: str) -> Figures:
        with open_rig(servers, cloud, launcher, instances=2, **{MUTANT: kind}) as rig:
            return SCENARIOS[mutant](rig)

    as_it_is, found = figures(AS_IT_IS), figures(mutant)

    assert as_it_is.once
    assert not found.once
    assert (found.lost, found.duplicated, found.unexpected) == (0, ROWS, 0)
