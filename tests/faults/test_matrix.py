"""Every call that a run makes, failed before and after it is applied and amid its stream."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.plan import Fault, Kind
from tests.faults.rig import JOURNALLED, Instance, Launcher, Rig, open_rig
from tests.faults.schedule import HTTP_KINDS, RPC_KINDS, undisturbed

MIB = 2**20

UNARY = (
    "CreateReadSession",
    "CreateWriteStream",
    "FinalizeWriteStream",
    "BatchCommitWriteStreams",
)
# Opened, and what is sent in them: a fault at one of the latter breaks the stream amid.
STREAMS = ("ReadRows", "ReadRows.message", "AppendRows", "AppendRows.request")
HTTP = (
    "bq.get_table",
    "bq.get_dataset",
    "bq.create_table",
    "gcs.list",
    "gcs.get_metadata",
    "gcs.download",
)
# What the run journal adds: a run's object is looked up, read where there is one, and written.
WRITES = ("runs.upload.running", "runs.upload.prepared", "runs.upload.committed")
JOURNAL = ("runs.get_metadata", "runs.download", *WRITES) if JOURNALLED else ()

# Made only where the streams of a run that was taken over are gone: whether its rows are there.
LOOK = ("bq.insert_job", "bq.query_results")

KINDS = dict.fromkeys(UNARY + STREAMS, RPC_KINDS) | dict.fromkeys(HTTP + JOURNAL + LOOK, HTTP_KINDS)

# Killed once its rows are there; whoever takes over is told that the streams are not known.
COMMITTED_AND_GONE = (
    Fault("BatchCommitWriteStreams", 1, Kind.KILLED_APPLIED),
    Fault("BatchCommitWriteStreams", 2, Kind.GONE),
)
SILENCE_SECONDS = 0.5

# Services side by side, since most of the time of a run that is disturbed is waiting.
SERVICES = 6


@pytest.fixture(scope="module")
def rig(servers: LocalServers, cloud: Cloud, launcher: Launcher) -> Iterator[Rig]:
    with open_rig(servers, cloud, launcher, instances=SERVICES) as running:
        yield running


@pytest.fixture(scope="module")
def counts(rig: Rig) -> Mapping[str, int]:
    """How often a run makes each call, where nothing fails."""
    return Counter(undisturbed(rig))


@pytest.fixture(scope="module")
def repeated(rig: Rig) -> Mapping[str, int]:
    """How often each call is made where a run that has ended is asked for again."""
    wanted = rig.wanted()
    rig.until_done(wanted)
    plan = rig.instance.follow(())
    rig.until_done(wanted)
    return plan.counts


@pytest.fixture(scope="module")
def looks(rig: Rig) -> Mapping[str, int]:
    """How often each call is made where the streams of a run are gone once they are committed."""
    plan = rig.instance.follow(COMMITTED_AND_GONE)
    rig.until_done(rig.wanted())
    return plan.counts


@pytest.fixture(scope="module")
def impatient(servers: LocalServers, cloud: Cloud, launcher: Launcher) -> Iterator[Rig]:
    """Services that take a stream for dead that says nothing for half a second."""
    with open_rig(
        servers, cloud, launcher, instances=SERVICES, SILENCE_SECONDS=str(SILENCE_SECONDS)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def memory(rig: Rig, counts: Mapping[str, int]) -> int:
    """The most memory that a service has held when one run is over."""
    return max(instance.peak_memory() for instance in rig.instances)


def test_a_run_makes_the_calls_of_this_matrix_and_no_others(counts: Mapping[str, int]) -> None:
    assert set(counts) - set(JOURNAL) == {*UNARY, *STREAMS, *HTTP}
    assert any(call in counts for call in JOURNAL) == JOURNALLED
    for call in ("ReadRows", "AppendRows", "CreateWriteStream", "FinalizeWriteStream"):
        assert counts[call] > 1, "there have to be several streams"
    for call in ("ReadRows.message", "AppendRows.request"):
        assert counts[call] >= 8, "and several messages in each"


@pytest.mark.parametrize("call", UNARY + STREAMS + HTTP + JOURNAL)
def test_a_run_writes_once_whatever_fails(
    rig: Rig, counts: Mapping[str, int], memory: int, call: str
) -> None:
    assert counts[call] or call in JOURNAL, f"a run does not call {call}"

    # How often a lease is renewed is up to the machine: only the first such write is sure to come.
    count = 1 if call in WRITES else counts[call]

    failures = all_failures(rig, faults_of(call, count), disturbed)

    assert not failures, "\n".join(failures)
    for instance in rig.instances:
        assert instance.peak_memory() < memory + 64 * MIB


@pytest.mark.parametrize("call", JOURNAL)
def test_a_run_that_has_ended_is_answered_as_before_whatever_fails(
    rig: Rig, repeated: Mapping[str, int], call: str
) -> None:
    failures = all_failures(rig, faults_of(call, repeated[call]), disturbed_again)

    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("call", LOOK)
def test_rows_are_looked_for_whatever_fails(rig: Rig, looks: Mapping[str, int], call: str) -> None:
    assert looks[call], f"the look does not call {call}"

    failures = all_failures(rig, faults_of(call, looks[call]), disturbed_look)

    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("call", STREAMS)
def test_a_stream_that_falls_silent_is_opened_again(
    impatient: Rig, counts: Mapping[str, int], call: str
) -> None:
    faults = [Fault(call, nth, Kind.SILENT) for nth in places(counts[call])]

    failures = all_failures(impatient, faults, disturbed)

    assert not failures, "\n".join(failures)


def faults_of(call: str, count: int) -> list[Fault]:
    """Everything that may happen to the first, the middle and the last of so many calls."""
    return [Fault(call, nth, kind) for kind in KINDS[call] for nth in places(count)]


def places(count: int) -> list[int]:
    """The first, the middle and the last of so many."""
    return sorted({1, (count + 1) // 2, count}) if count else []


type Disturb = Callable[[Rig, Instance, Fault], None]


def all_failures(rig: Rig, faults: Sequence[Fault], disturb: Disturb) -> list[str]:
    """What goes wrong where these faults happen, each to a run of its own."""
    free: queue.SimpleQueue[Instance] = queue.SimpleQueue()
    for instance in rig.instances:
        free.put(instance)
    with ThreadPoolExecutor(len(rig.instances)) as pool:
        return [each for each in pool.map(partial(failure, rig, free, disturb), faults) if each]


def failure(rig: Rig, free: queue.SimpleQueue[Instance], disturb: Disturb, fault: Fault) -> str:
    """What is wrong with a run that has this fault, on a service that is free."""
    instance = free.get()
    try:
        disturb(rig, instance, fault)
    except AssertionError as error:
        return f"{fault}: {error}"
    finally:
        free.put(instance)
    return ""


def disturbed(rig: Rig, instance: Instance, fault: Fault) -> None:
    """A run with one fault, which has to end well."""
    wanted, plan = rig.wanted(), instance.follow([fault])

    story = rig.until_done(wanted, choose=lambda: instance)

    assert plan.injected == [fault]
    figures = rig.look(wanted)
    assert figures.once, (str(fault), figures, story.answers)


def disturbed_again(rig: Rig, instance: Instance, fault: Fault) -> None:
    """A run that ends well, and is asked for again with one fault."""
    wanted = rig.wanted()
    instance.follow(())
    before = rig.until_done(wanted, choose=lambda: instance)
    plan = instance.follow([fault])

    after = rig.until_done(wanted, choose=lambda: instance)

    assert plan.injected == [fault]
    assert after.result == before.result
    figures = rig.look(wanted)
    assert figures.once, (str(fault), figures, after.answers)


def disturbed_look(rig: Rig, instance: Instance, fault: Fault) -> None:
    """A run whose streams are gone once they are committed, and one fault while it finds out."""
    wanted, plan = rig.wanted(), instance.follow([*COMMITTED_AND_GONE, fault])

    story = rig.until_done(wanted, choose=lambda: instance)

    assert fault in plan.injected, story.answers
    figures = rig.look(wanted)
    assert figures.once, (str(fault), figures, story.answers)
