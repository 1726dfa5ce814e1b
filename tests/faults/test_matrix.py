"""Every call that a run makes, failed before and after it is applied and amid its stream."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.plan import Fault, Kind
from tests.faults.rig import JOURNALLED, Rig

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
CASES = [(call, kind) for call in UNARY + STREAMS for kind in RPC_KINDS] + [
    (call, kind) for call in HTTP + JOURNAL for kind in HTTP_KINDS
]


@pytest.fixture(scope="module")
def counts(rig: Rig) -> Counter[str]:
    """How often a run makes each call, where nothing fails."""
    plan = rig.instance.follow(())
    rig.until_done(rig.wanted())
    return plan.counts


@pytest.fixture(scope="module")
def memory(rig: Rig, counts: Counter[str]) -> int:
    """The most memory that the service has held when one run is over."""
    return rig.instance.peak_memory()


def test_a_run_makes_the_calls_of_this_matrix_and_no_others(counts: Counter[str]) -> None:
    assert set(counts) == {*UNARY, *STREAMS, *HTTP, *JOURNAL}
    for call in ("ReadRows", "AppendRows", "CreateWriteStream", "FinalizeWriteStream"):
        assert counts[call] > 1, "there have to be several streams"
    for call in ("ReadRows.message", "AppendRows.request"):
        assert counts[call] >= 8, "and several messages in each"


@pytest.mark.parametrize(("call", "kind"), CASES, ids=[f"{c}-{k}" for c, k in CASES])
def test_a_run_writes_once_whatever_fails(
    rig: Rig, counts: Counter[str], memory: int, call: str, kind: Kind
) -> None:
    assert counts[call], f"a run does not call {call}"
    for nth in sorted({1, (counts[call] + 1) // 2, counts[call]}):
        fault, wanted = Fault(call, nth, kind), rig.wanted()
        plan = rig.instance.follow([fault])

        story = rig.until_done(wanted)

        assert plan.injected == [fault]
        figures = rig.look(wanted)
        assert figures.once, (str(fault), figures, story.answers)
    assert rig.instance.peak_memory() < memory + 64 * MIB
