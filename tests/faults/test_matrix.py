"""Every call that a run makes, failed before and after it is applied and amid its stream."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.plan import Fault, Kind
from tests.faults.rig import JOURNALLED, Instance, Launcher, Rig, open_rig

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
# What the run journal adds: a run's object is read, and written at each step.
JOURNAL = ("runs.get_metadata", "runs.download", "runs.upload") if JOURNALLED else ()

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
KINDS = dict.fromkeys(UNARY + STREAMS, RPC_KINDS) | dict.fromkeys(HTTP + JOURNAL, HTTP_KINDS)

# Services side by side, since most of the time of a run that is disturbed is waiting.
SERVICES = 6


@pytest.fixture(scope="module")
def rig(servers: LocalServers, cloud: Cloud, launcher: Launcher) -> Iterator[Rig]:
    with open_rig(servers, cloud, launcher, instances=SERVICES) as running:
        yield running


@pytest.fixture(scope="module")
def counts(rig: Rig) -> Counter[str]:
    """How often a run makes each call, where nothing fails."""
    for instance in rig.instances:
        instance.follow(())
        rig.until_done(rig.wanted(), choose=lambda instance=instance: instance)
    return rig.instance.plan.counts


@pytest.fixture(scope="module")
def memory(rig: Rig, counts: Counter[str]) -> int:
    """The most memory that a service has held when one run is over."""
    return max(instance.peak_memory() for instance in rig.instances)


def test_a_run_makes_the_calls_of_this_matrix_and_no_others(counts: Counter[str]) -> None:
    assert set(counts) == {*UNARY, *STREAMS, *HTTP, *JOURNAL}
    for call in ("ReadRows", "AppendRows", "CreateWriteStream", "FinalizeWriteStream"):
        assert counts[call] > 1, "there have to be several streams"
    for call in ("ReadRows.message", "AppendRows.request"):
        assert counts[call] >= 8, "and several messages in each"


@pytest.mark.parametrize("call", KINDS)
def test_a_run_writes_once_whatever_fails(
    rig: Rig, counts: Counter[str], memory: int, call: str
) -> None:
    assert counts[call], f"a run does not call {call}"
    places = sorted({1, (counts[call] + 1) // 2, counts[call]})
    faults = [Fault(call, nth, kind) for kind in KINDS[call] for nth in places]
    free: queue.SimpleQueue[Instance] = queue.SimpleQueue()
    for instance in rig.instances:
        free.put(instance)

    with ThreadPoolExecutor(SERVICES) as pool:
        failures = [each for each in pool.map(partial(failure, rig, free), faults) if each]

    assert not failures, "\n".join(failures)
    for instance in rig.instances:
        assert instance.peak_memory() < memory + 64 * MIB


def failure(rig: Rig, free: queue.SimpleQueue[Instance], fault: Fault) -> str:
    """What is wrong with a run that has this fault, on a service that is free."""
    instance = free.get()
    try:
        disturbed(rig, instance, fault)
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
