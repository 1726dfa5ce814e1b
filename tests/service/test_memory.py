"""Memory: counted with what was started, shared out among runs, never taken beyond its limit."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime

import anyio
import numpy as np
import psutil
import pytest

from mlsys.errors import OutOfMemory, TooManyRuns
from mlsys.gcs import Blob
from mlsys.local import LocalServers
from mlsys.settings import Settings
from service.contract import ModelUsed, PredictRequest, PredictResult
from service.logs import configure_logging
from service.memory import MIB, Memory, peak_memory_bytes
from service.model import ModelCache
from service.runs import Run, Runs
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    PATIENCE,
    Background,
    ObjectsProxy,
    assert_nothing_appended,
    assert_problem,
    numbers,
    process_environment,
    request_for,
    service_process,
)

TABLES = ("my-project.data.input", "my-project.data.output")
PLENTY = 2**50
# More objects than the collector leaves alone by itself: some hundred that live for ever.
PYTHONS_OWN = 1000


@pytest.fixture(autouse=True, scope="module")
def logging_is_set_up() -> None:
    """As in a service: structlog's own way of writing an exception reads files."""
    configure_logging()


class Process:
    """Another process, that holds some memory until it is told to end."""

    def __init__(self, started: subprocess.Popen[str]) -> None:
        self.pid = started.pid


@contextmanager
def holding(mib: int, *, below: bool = False) -> Iterator[Process]:
    """A child that holds so much; `below`: a child of a child does."""
    hold = f"held = b'x' * ({mib} << 20); print('held', flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", code if below else hold],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout.readline() == "held\n"
        yield Process(started)
        started.communicate("\n")


def test_what_this_process_holds_is_counted() -> None:
    memory = Memory(PLENTY, MIB)
    before = memory.used()

    held = b"x" * (300 * MIB)

    assert before + 290 * MIB < memory.used() < before + 310 * MIB
    assert memory.used() == pytest.approx(psutil.Process().memory_info().rss, abs=20 * MIB)
    assert held


@pytest.mark.parametrize("below", [False, True], ids=["child", "child of a child"])
def test_what_was_started_is_counted_with_it(below: bool) -> None:
    memory = Memory(PLENTY, MIB)
    anyio.run(memory.look_below)
    before = memory.used()

    with holding(200, below=below):
        anyio.run(memory.look_below)
        with_child = memory.used()
    # It has ended, and is not looked for again yet.
    after = memory.used()

    assert before + 190 * MIB < with_child < before + 300 * MIB
    assert abs(after - before) < 20 * MIB


def test_the_peak_is_that_since_it_was_asked_for_last() -> None:
    memory = Memory(PLENTY, MIB)
    held = b"x" * (200 * MIB)
    with_it = memory.used()
    del held
    without = memory.used()

    assert memory.peak_since_reset() == with_it
    assert memory.peak_since_reset() == pytest.approx(without, abs=20 * MIB)


def test_what_the_collector_was_to_leave_alone_is_given_back_once_it_is_garbage() -> None:
    memory = Memory(PLENTY, MIB)
    held: list[object] = [b"x" * (200 * MIB)]
    held.append(held)
    memory.leave_alone()
    try:
        with_it = memory.used()
        del held

        anyio.run(memory.release)

        assert memory.used() < with_it - 190 * MIB
        assert gc.get_freeze_count() > PYTHONS_OWN
    finally:
        gc.unfreeze()


def test_nothing_is_left_alone_where_nobody_asked_for_that() -> None:
    anyio.run(Memory(PLENTY, MIB).release)

    assert gc.get_freeze_count() < PYTHONS_OWN


def test_the_limit_is_what_there_is_where_no_setting_says_otherwise() -> None:
    found = Memory.of(Settings(_env_file=None)).limit

    assert 100 * MIB < found <= psutil.virtual_memory().total
    assert Memory.of(Settings(_env_file=None, memory_limit_bytes=5 * MIB)).limit == 5 * MIB


def test_the_peak_of_memory_is_that_of_this_process_in_bytes() -> None:
    parents = bytearray(500 * MIB)
    parents[::4096] = b"x" * len(parents[::4096])
    tell = "from service.memory import peak_memory_bytes; print(peak_memory_bytes())"

    told = subprocess.run([sys.executable, "-c", tell], capture_output=True, check=True, text=True)

    assert peak_memory_bytes() > len(parents)
    # Python with pandas and pyarrow, and not what the process holds that started it.
    assert 20 * MIB < int(told.stdout) < 400 * MIB


def request() -> PredictRequest:
    return PredictRequest(**request_for(*TABLES, "titanic-survival"))


NOW = datetime.now(UTC)
RESULT = PredictResult(
    message="1 row",
    run_id="r",
    rows=1,
    input_table=TABLES[0],
    output_table=TABLES[1],
    model=ModelUsed(name="titanic-survival", version="v3", uri="gs://…", generation=7),
    started_at=NOW,
    ended_at=NOW,
    seconds=1,
    rows_per_second=1,
    peak_memory_bytes=1,
)


@asynccontextmanager
async def runs_within(
    memory: Memory, most: int = 10, spare: Callable[[], None] = lambda: None
) -> AsyncIterator[Runs]:
    """Runs in that memory; those that go on at the end of the block are cancelled."""
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            yield Runs(tasks, most, memory, spare=spare)
            tasks.cancel_scope.cancel()


def until(event: anyio.Event) -> Callable[[Run], Awaitable[PredictResult]]:
    async def work(run: Run) -> PredictResult:
        run.begin(1)
        await event.wait()
        return RESULT

    return work


def taking_too_much_of(memory: Memory) -> Callable[[Run], Awaitable[PredictResult]]:
    async def work(run: Run) -> PredictResult:
        run.begin(1)
        held = b"x" * (memory.brink - memory.used() + 10 * MIB)
        await anyio.sleep_forever()
        return RESULT.model_copy(update={"rows": len(held)})

    return work


async def memory_with(mib: int, run_bytes: int = 1, share: float = 0.8) -> Memory:
    """One of which `share` is so many MiB more than what this process and its servers use."""
    memory = Memory(PLENTY, run_bytes)
    await memory.look_below()
    memory.limit = int((memory.used() + mib * MIB) / share)
    return memory


@pytest.mark.anyio
async def test_a_run_begins_beside_others_only_where_there_is_room() -> None:
    memory, let_go = await memory_with(250, 100 * MIB), anyio.Event()
    async with runs_within(memory) as runs:
        first, second = (runs.start(request(), until(let_go)) for _ in range(2))
        with pytest.raises(TooManyRuns, match="MiB of memory.* beside the 2 under way") as refused:
            runs.start(request(), until(let_go))
        assert refused.value.retry_after > 0

        first.cancel("…")
        await first.ended.wait()
        third = runs.start(request(), until(let_go))

        let_go.set()
        await second.ended.wait()
        await third.ended.wait()
    assert second.result == third.result == RESULT


@pytest.mark.anyio
async def test_what_is_in_use_counts_where_it_is_more_than_was_expected() -> None:
    memory, let_go = await memory_with(250, 100 * MIB), anyio.Event()
    async with runs_within(memory) as runs:
        runs.start(request(), until(let_go))
        held = b"x" * (200 * MIB)

        with pytest.raises(TooManyRuns):
            runs.start(request(), until(let_go))
        assert held


@pytest.mark.anyio
async def test_a_run_that_is_alone_may_always_begin() -> None:
    memory, let_go = await memory_with(10, 100 * MIB), anyio.Event()
    async with runs_within(memory) as runs:
        run = runs.start(request(), until(let_go))
        let_go.set()
        await run.ended.wait()

    assert run.result == RESULT


@pytest.mark.anyio
async def test_where_memory_gets_short_each_run_is_asked_for_less() -> None:
    memory, let_go = await memory_with(100), anyio.Event()
    asked: list[str] = []
    all_asked = anyio.Event()

    def relieve(name: str, can: bool) -> Callable[[], bool]:
        def ask() -> bool:
            asked.append(name)
            if {"a", "b"} <= set(asked):
                all_asked.set()
            return can

        return ask

    spared = anyio.Event()
    async with runs_within(memory, spare=spared.set) as runs:
        first, second, unable = (runs.start(request(), until(let_go)) for _ in range(3))
        first.relieve, second.relieve = relieve("a", True), relieve("b", False)
        await anyio.wait_all_tasks_blocked()
        assert not asked
        # Past the budget, and not as far as the brink.
        held = b"x" * (memory.budget - memory.used() + (memory.brink - memory.budget) // 2)

        await all_asked.wait()

        assert held
        assert spared.is_set()
        assert not any(run.ended_because for run in (first, second, unable))
        let_go.set()
        for run in (first, second, unable):
            await run.ended.wait()
            assert run.result == RESULT


@pytest.mark.anyio
async def test_before_memory_runs_out_the_newest_run_ends_and_the_others_go_on() -> None:
    memory, let_go = await memory_with(100), anyio.Event()
    async with runs_within(memory) as runs:
        older = runs.start(request(), until(let_go))
        newest = runs.start(request(), taking_too_much_of(memory))

        await newest.ended.wait()

        assert isinstance(newest.error, OutOfMemory)
        assert "MiB of memory" in str(newest.error)
        assert "smaller chunk_rows" in str(newest.error)
        assert not older.ended.is_set()
        let_go.set()
        await older.ended.wait()
    assert older.result == RESULT


@pytest.mark.anyio
async def test_a_watch_begins_anew_with_the_next_run() -> None:
    memory = await memory_with(100)
    async with runs_within(memory) as runs:
        for _ in range(2):
            run = runs.start(request(), taking_too_much_of(memory))
            await run.ended.wait()
            assert isinstance(run.error, OutOfMemory)
            await anyio.wait_all_tasks_blocked()


def blob(name: str, mib: int) -> Blob:
    return Blob("mlsys-models-dev", f"{name}/v1/model.pkl", 1, mib * MIB, "")


@pytest.mark.anyio
async def test_models_that_are_kept_go_where_another_would_not_fit_beside_them() -> None:
    memory, loads = await memory_with(300), []

    async def load(wanted: Blob) -> np.ndarray:
        loads.append(wanted)
        return np.ones(200 * MIB // 8)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            cache, kept = ModelCache(PLENTY, tasks, memory), blob("kept", 1)
            for _ in range(2):
                await cache.get(kept, load)
            await cache.make_room(blob("small", 10))
            await cache.get(kept, load)
            assert loads == [kept]

            await cache.make_room(blob("large", 100))

            assert memory.fits(200 * MIB)
            await cache.get(kept, load)
            assert loads == [kept, kept]
            with pytest.raises(OutOfMemory, match=r"too-large/v1/model.pkl takes about 800 MiB"):
                await cache.make_room(blob("too-large", 400))


LIMIT = 700 * MIB


# In steps that are smaller than what is between the brink and the limit: no watch could catch more.
@pytest.mark.parametrize(
    "eats", [models.EatsMemory(8), models.EatsMemory(40, seconds=0.5)], ids=["at once", "slowly"]
)
def test_a_run_that_takes_too_much_fails_and_the_service_lives_on(
    servers: LocalServers, cloud: Cloud, eats: models.EatsMemory
) -> None:
    table, output, other = cloud.put(numbers(20_000)), cloud.new_table(), cloud.new_table()
    eats, doubles = cloud.publish(eats), cloud.publish(models.Doubles())
    run_id = cloud.name("eats")
    env = process_environment(
        **servers.env, PREDICT_THREADS="1", CHUNK_ROWS="100", MEMORY_LIMIT_BYTES=str(LIMIT)
    )
    with service_process(env) as process, Client(base_url=process.url, timeout=PATIENCE) as client:
        failed = client.predict(table, output, eats, run_id=run_id)
        told = client.get(f"/runs/{run_id}").json()
        after = client.predict(table, other, doubles)
        peak = psutil.Process(process.process.pid).memory_info().rss
        process.wait_for_line("memory is short")

    problem = assert_problem(
        failed, 503, "700 MiB of memory", "Nothing was written", "smaller chunk_rows"
    )
    assert problem["type"] == "urn:mlsys:out-of-memory"
    assert int(failed.headers["Retry-After"]) >= 1
    assert_nothing_appended(cloud, output)
    assert (told["state"], told["error"]["status"]) == ("failed", 503)
    assert after.status_code == 200, after.text
    assert cloud.count(other) == 20_000
    assert after.json()["peak_memory_bytes"] < LIMIT
    assert peak < 0.8 * LIMIT


def test_a_model_that_does_not_fit_is_refused_before_it_is_downloaded(
    servers: LocalServers, cloud: Cloud, objects: ObjectsProxy
) -> None:
    table, output = cloud.put(numbers(10)), cloud.new_table()
    large, small = cloud.publish(models.Times(3, 100 * MIB)), cloud.publish(models.Times(3))
    env = process_environment(
        **servers.env | {"STORAGE_EMULATOR_HOST": objects.url}, MEMORY_LIMIT_BYTES=str(450 * MIB)
    )
    with service_process(env) as process, Client(base_url=process.url, timeout=PATIENCE) as client:
        refused = client.predict(table, output, large)
        fits = client.predict(table, output, small)

    assert_problem(refused, 503, "takes about 200 MiB to load", "450 MiB of memory")
    assert "Retry-After" in refused.headers
    assert objects.downloads_of(large) == 0
    assert fits.status_code == 200, fits.text
    assert cloud.count(output) == 10


def test_the_caller_of_a_run_without_room_is_told_to_come_back(
    cloud: Cloud, start_service: Callable[..., Client]
) -> None:
    service = start_service(max_runs=8, memory_limit_bytes=PLENTY, run_memory_bytes=PLENTY // 2)
    table, gate = cloud.put(numbers(10)), cloud.name("gate")
    gated, doubles = cloud.publish(models.Gated(gate)), cloud.publish(models.Doubles())
    first = Background(lambda: service.predict(table, cloud.new_table(), gated))
    assert models.event(f"{gate} entered").wait(PATIENCE)

    second = service.predict(table, cloud.new_table(), doubles)

    models.event(f"{gate} open").set()
    assert_problem(second, 429, "of memory, which is too little for another run beside the 1")
    assert int(second.headers["Retry-After"]) >= 1
    assert first.result().status_code == 200
