"""Whether a model needs processes is measured, whatever else happens in the meantime."""

from __future__ import annotations

import sys
import time
from hashlib import pbkdf2_hmac

import anyio
import pyarrow as pa
import pytest

from service.source import Chunk, Source
from service.trial import interpreter_bound

pytestmark = pytest.mark.anyio

# Of which a slow model takes minutes, and a quick one seconds.
MANY = 2_000_000


async def bound(
    predictor, *batches: pa.RecordBatch, rows: int = MANY, start_seconds: float = 2
) -> bool:
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](len(batches))
    with received:
        async with sent:
            for batch in batches:
                await sent.send(batch)
        source = Source(received)
        limiter = anyio.CapacityLimiter(1)
        decided = await interpreter_bound(
            predictor,
            source.peek,
            rows,
            limiter=limiter,
            calls=2,
            start_seconds=start_seconds,
        )
        kept = await source.chunk(rows)
        given = [batch for batch in batches if batch.num_rows]
        assert kept == (Chunk(0, 0, pa.Table.from_batches(given)) if given else None)
    return decided


def batch(rows: int) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array(range(rows), pa.int64())})


def work(seconds: float) -> None:
    """Holds the interpreter, as Python code does."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def test_a_model_that_holds_the_interpreter_is_found_out() -> None:
    assert await bound(lambda rows: work(1e-4 * len(rows)), batch(5000))


async def test_a_quick_model_is_none_whose_first_call_takes_long() -> None:
    called = []

    def predict(rows: pa.Table) -> None:
        work(1e-3 if called else 0.2)
        called.append(rows)

    assert not await bound(predict, batch(5000))


async def test_what_a_call_costs_by_itself_is_not_taken_for_its_rows() -> None:
    assert not await bound(lambda rows: work(1e-3), batch(20))


async def test_a_call_that_is_held_up_is_asked_again() -> None:
    called = []

    def predict(rows: pa.Table) -> None:
        work(0.2 if len(called) == 2 else 1e-3)
        called.append(rows)

    assert not await bound(predict, batch(5000))


async def test_a_model_whose_calls_begin_in_python_is_measured_on_many_rows() -> None:
    def predict(rows: pa.Table) -> None:
        work(0.03)
        # Compiled, and without the interpreter.
        pbkdf2_hmac("sha256", b"word", b"salt", 20 * len(rows))

    assert not await bound(predict, batch(20_000))


async def test_a_model_in_python_is_found_out_however_its_calls_begin() -> None:
    assert await bound(lambda rows: work(0.03 + 1e-4 * len(rows)), batch(20_000))


async def test_a_first_message_without_rows_is_passed_over() -> None:
    assert await bound(lambda rows: work(1e-4 * len(rows)), batch(0), batch(5000))


async def test_a_model_that_is_tried_on_no_rows_stays_where_it_is() -> None:
    assert not await bound(lambda rows: work(1), batch(0))


async def test_small_tables_are_not_worth_a_trial() -> None:
    tried = []

    assert not await bound(tried.append, batch(10), rows=1000)
    assert not tried


@pytest.mark.parametrize(("start_seconds", "pays"), [(20, False), (0.2, True)])
async def test_what_pays_depends_on_what_processes_take_to_start(
    start_seconds: float, pays: bool
) -> None:
    # Six seconds of work, of which two processes save three.
    decided = await bound(
        lambda rows: work(1e-4 * len(rows)), batch(5000), rows=60_000, start_seconds=start_seconds
    )

    assert decided == pays


async def test_trials_at_once_leave_the_interpreter_as_it_was() -> None:
    before = sys.getswitchinterval()

    def both(rows: pa.Table) -> None:
        time.sleep(0.03)  # Lets the other trial begin, and end after this one.
        work(1e-4 * len(rows))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(bound, both, batch(500))

    assert sys.getswitchinterval() == before
