"""Runs are admitted, counted and ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from mlsys.errors import NotFound, RunMismatch, TooManyRuns, Unavailable, UnderWay
from service.contract import ModelUsed, PredictRequest, PredictResult
from service.logs import configure_logging
from service.runs import Run, Runs
from tests.service.support import PATIENCE, request_for

pytestmark = pytest.mark.anyio

TABLES = ("my-project.data.input", "my-project.data.output")


@pytest.fixture(autouse=True, scope="module")
def logging_is_set_up() -> None:
    """As in a service: structlog's own way of writing an exception reads files."""
    configure_logging()


def request(**more: Any) -> PredictRequest:
    return PredictRequest(**request_for(*TABLES, "titanic-survival", **more))


def result(rows: int) -> PredictResult:
    now = datetime.now(UTC)
    model = ModelUsed(name="titanic-survival", version="v3", uri="gs://…", generation=7)
    return PredictResult(
        message=f"{rows} rows",
        run_id="r",
        rows=rows,
        input_table=TABLES[0],
        output_table=TABLES[1],
        model=model,
        started_at=now,
        ended_at=now,
        seconds=1,
        rows_per_second=rows,
        peak_memory_bytes=1,
    )


async def carried_out(run: Run, work: Callable[[Run], Awaitable[PredictResult]]) -> Run:
    with anyio.fail_after(PATIENCE):
        await run.carry_out(work)
    return run


async def test_progress_before_the_run_begins_knows_no_total() -> None:
    progress = Run(request(run_id="r")).progress()

    assert (progress.run_id, progress.rows_done, progress.rows_total) == ("r", 0, None)
    assert progress.rows_per_second == 0
    assert progress.seconds_left is None


async def test_progress_counts_what_is_acknowledged_and_estimates_the_rest() -> None:
    run = Run(request())
    run.begin(1000)
    run.advance(100)
    run.advance(150)

    progress = run.progress()

    assert (progress.rows_done, progress.rows_total) == (250, 1000)
    assert progress.rows_per_second > 0
    # Three times what is done is left, at the same rate; whole seconds.
    assert progress.seconds_left == int(progress.seconds_left)
    assert progress.seconds_left >= 750 / progress.rows_per_second * 0.99


async def test_progress_without_a_total_estimates_nothing() -> None:
    run = Run(request(where="a > 1"))
    run.begin(None)
    run.advance(100)

    assert (run.progress().rows_total, run.progress().seconds_left) == (None, None)


async def test_more_rows_than_the_table_was_said_to_have_leave_no_time_to_wait() -> None:
    run = Run(request())
    run.begin(100)
    run.advance(150)

    assert run.progress().seconds_left == 0


async def test_nothing_done_yet_estimates_nothing() -> None:
    run = Run(request())
    run.begin(100)

    assert run.progress().seconds_left is None


async def test_a_run_that_ends_well_has_a_result() -> None:
    async def work(run: Run) -> PredictResult:
        run.begin(1234)
        return result(1234)

    run = await carried_out(Run(request(run_id="r")), work)

    assert run.error is None
    assert run.begun.is_set()
    assert run.ended.is_set()
    assert run.result.rows == 1234


@pytest.mark.parametrize("error", [NotFound("Look elsewhere."), RuntimeError("hush")])
async def test_a_run_that_fails_has_its_error(error: Exception) -> None:
    async def work(run: Run) -> PredictResult:
        raise error

    run = await carried_out(Run(request()), work)

    assert run.error is error
    assert run.result is None
    assert run.begun.is_set()
    assert run.ended.is_set()


async def test_a_run_that_is_told_to_end_says_why() -> None:
    async def work(run: Run) -> PredictResult:
        run.cancel("the caller went away")
        await anyio.sleep_forever()

    run = await carried_out(Run(request()), work)

    assert isinstance(run.error, Unavailable)
    assert "the caller went away" in str(run.error)
    assert run.result is None


@pytest.fixture
async def let_go() -> anyio.Event:
    return anyio.Event()


@asynccontextmanager
async def admitting(let_go: anyio.Event, most: int = 2) -> AsyncIterator[Runs]:
    """Runs, at most `most` at once; those of `until(let_go)` end with the block."""
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            yield Runs(tasks, most)
            let_go.set()


def until(event: anyio.Event) -> Callable[[Run], Awaitable[PredictResult]]:
    async def work(run: Run) -> PredictResult:
        run.begin(1)
        await event.wait()
        return result(1)

    return work


async def test_no_more_runs_than_may_be_are_under_way(let_go: anyio.Event) -> None:
    async with admitting(let_go) as runs:
        first, second = (runs.start(request(), until(let_go)) for _ in range(2))
        with pytest.raises(TooManyRuns, match="2 runs under way"):
            runs.start(request(), until(let_go))

        first.cancel("…")
        await first.ended.wait()
        third = runs.start(request(), until(let_go))

        let_go.set()
        await second.ended.wait()
        await third.ended.wait()
    assert second.result.rows == third.result.rows == 1


async def test_a_name_is_free_again_when_its_run_has_ended(let_go: anyio.Event) -> None:
    async with admitting(let_go) as runs:
        first = runs.start(request(run_id="r"), until(let_go))
        with pytest.raises(UnderWay, match="The run r is under way"):
            runs.start(request(run_id="r"), until(let_go))

        let_go.set()
        await first.ended.wait()
        assert runs.start(request(run_id="r"), until(let_go)) is not first


async def test_a_run_that_fails_frees_its_place(let_go: anyio.Event) -> None:
    async def fail(run: Run) -> PredictResult:
        raise RuntimeError("hush")

    async with admitting(let_go, most=1) as runs:
        for _ in range(3):
            run = runs.start(request(run_id="r"), fail)
            await run.ended.wait()
            assert isinstance(run.error, RuntimeError)


async def test_all_runs_are_ended_together(let_go: anyio.Event) -> None:
    async with admitting(let_go) as runs:
        both = [runs.start(request(), until(let_go)) for _ in range(2)]
        await anyio.wait_all_tasks_blocked()

        runs.cancel_all("this instance is shutting down")

        for run in both:
            await run.ended.wait()
            assert "shutting down" in str(run.error)


async def test_each_environment_has_run_ids_of_its_own(let_go: anyio.Event) -> None:
    async with admitting(let_go) as runs:
        first = runs.start(request(run_id="r", env="dev"), until(let_go))
        other = runs.start(request(run_id="r", env="staging"), until(let_go))

        let_go.set()
        await first.ended.wait()
        await other.ended.wait()
    assert first.error is other.error is None


async def test_a_run_under_way_is_not_one_with_other_parameters(let_go: anyio.Event) -> None:
    async with admitting(let_go) as runs:
        runs.start(request(run_id="r", where="x > 1"), until(let_go))

        with pytest.raises(RunMismatch, match="The run r has other parameters"):
            runs.start(request(run_id="r", where="x > 2"), until(let_go))


async def test_a_cancellation_that_strays_into_a_run_ends_no_other(let_go: anyio.Event) -> None:
    shared = asyncio.ensure_future(asyncio.sleep(PATIENCE))

    async def wait_for_it(run: Run) -> PredictResult:
        await shared
        return result(1)

    async with admitting(let_go) as runs:
        stray, other = runs.start(request(), wait_for_it), runs.start(request(), until(let_go))
        await anyio.wait_all_tasks_blocked()
        shared.cancel()  # As a client's task that several await is, with the first of them.

        await stray.ended.wait()
        third = runs.start(request(), until(let_go))
        let_go.set()
        await other.ended.wait()
        await third.ended.wait()
    assert isinstance(stray.error, Unavailable)
    assert other.result.rows == third.result.rows == 1
