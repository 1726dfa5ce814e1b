"""The protocol by which a run id writes once, driven through schedules that Hypothesis thinks of.

BigQuery and Cloud Storage are a few lines each here, and every wait of `write_once` is a choice:
the call is answered, fails, its answer is lost, or it is applied when nobody expects it any more;
its instance is killed, or sleeps past its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlsys.errors import Conflict, IntegrityError, TakenOver, Unavailable
from mlsys.gcs import Blob
from service.contract import ModelUsed, PredictRequest, PredictResult, Problem, RunState
from service.journal import Entry, Lost, Pins, RunRecord
from service.logs import configure_logging
from service.once import Lease, write_once
from service.problems import problem_of
from tests.faults.mutants import without_fence
from tests.service.support import request_for

RUN_ID = "nightly-7"
REQUEST = PredictRequest(
    **request_for("project.data.input", "project.data.output", "titanic", run_id=RUN_ID)
)
BLOB = Blob("mlsys-models-dev", "titanic/v3/model.pkl", generation=7, size=1, crc32c="")
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = 30.0
# The rows of a run, by the stream that takes them.
SHARDS = ((0, 1), (2,))
ROWS = sum(map(len, SHARDS))
MOST_INSTANCES = 4
# How many calls an undisturbed one takes at most, with every attempt that it may begin.
ENOUGH = 100


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when it is told to, and that knows when all of it waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self._busy = False
        super().__init__()

    def time(self) -> float:
        return self.now

    def call_soon(self, *args: Any, **more: Any) -> asyncio.Handle:
        self._busy = True
        return super().call_soon(*args, **more)

    def settle(self) -> None:
        """Runs until every task waits for an answer, or for time to pass."""
        for _ in range(1000):
            self.call_soon(self.stop)
            self._busy = False
            self.run_forever()
            if not self._busy:
                return
        raise AssertionError("it never comes to rest")


@dataclass
class Call:
    """A call on its way to a server, and whoever waits for the answer."""

    caller: Instance
    name: str
    apply: Callable[[], Any]
    answer: asyncio.Future[Any]


@dataclass
class Instance:
    """One call of `write_once`, as an instance of the service makes it."""

    number: int
    skew: float
    scope: anyio.CancelScope | None = None
    outcome: PredictResult | BaseException | None = None
    alive: bool = True

    @property
    def under_way(self) -> bool:
        return self.alive and self.outcome is None


@dataclass(frozen=True)
class Stream:
    """A finalized write stream."""

    rows: tuple[int, ...]
    predicted_at: datetime


class NoSuchStreams(Exception):
    """What BigQuery says to a commit of streams that it does not know."""


@dataclass
class World:
    """BigQuery, Cloud Storage, the instances, and what is on its way between them."""

    loop: Loop
    streams: dict[str, Stream] = field(default_factory=dict)
    committed: dict[str, Stream] = field(default_factory=dict)
    record: Entry | None = None
    waiting: list[Call] = field(default_factory=list)
    late: list[Callable[[], Any]] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    over: bool = False

    @property
    def rows(self) -> Counter[int]:
        """How often each row is in the output table."""
        return Counter(row for stream in self.committed.values() for row in stream.rows)

    async def ask(self, caller: Instance, name: str, apply: Callable[[], Any]) -> Any:
        """Makes a call; the answer comes when and how the schedule has it."""
        if self.over:
            raise Unavailable("There is no world any more.")
        call = Call(caller, name, apply, self.loop.create_future())
        self.waiting.append(call)
        try:
            return await call.answer
        except asyncio.CancelledError:
            # Its caller does not wait any more, and the server may have it all the same.
            if call in self.waiting:
                self.waiting.remove(call)
                self.late.append(apply)
            raise

    # Cloud Storage.

    def read(self) -> Entry | None:
        return self.record

    def write(self, record: RunRecord, generation: int) -> Entry:
        if generation != (self.record.generation if self.record else 0):
            raise Lost
        self.record = Entry(record, next(self.numbers))
        return self.record

    # BigQuery.

    def fill(self, pins: Pins) -> tuple[str, ...]:
        filled = {f"streams/{next(self.numbers)}": Stream(s, pins.predicted_at) for s in SHARDS}
        self.streams |= filled
        return tuple(filled)

    def commit(self, names: tuple[str, ...]) -> None:
        if not set(names) <= set(self.streams):
            raise NoSuchStreams
        self.committed |= {name: self.streams[name] for name in names}

    def count(self, pins: Pins) -> int:
        return sum(
            len(stream.rows)
            for stream in self.committed.values()
            if stream.predicted_at == pins.predicted_at
        )


class Store:
    """The journal, as one instance sees it."""

    def __init__(self, world: World, instance: Instance) -> None:
        self._world = world
        self._instance = instance

    async def read(self, run_id: str) -> Entry | None:
        return await self._world.ask(self._instance, "read", self._world.read)

    async def write(self, record: RunRecord, generation: int) -> Entry:
        return await self._world.ask(
            self._instance, "write", lambda: self._world.write(record, generation)
        )


class Clock:
    """The clock of one instance, which need not be right."""

    def __init__(self, world: World, instance: Instance) -> None:
        self._world = world
        self._instance = instance

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self._world.loop.now + self._instance.skew)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


def told_of(record: RunRecord, message: str) -> PredictResult:
    """A result by which its teller is known."""
    at = record.pins.predicted_at
    return PredictResult(
        message=message,
        run_id=record.run_id,
        rows=record.rows,
        input_table=record.request.input_table,
        output_table=record.request.output_table,
        model=ModelUsed(name="titanic", version="v3", uri="gs://…", generation=7),
        started_at=at,
        ended_at=at,
        seconds=0,
        rows_per_second=0,
        peak_memory_bytes=0,
    )


class Prediction:
    """What a run does, as `service/engine.py` has it: see `Work`."""

    def __init__(self, world: World, instance: Instance) -> None:
        self._world = world
        self._instance = instance
        self._pins: Pins | None = None

    async def plan(self, pins: Pins | None) -> Pins:
        await self._ask("plan", lambda: None)
        # No two attempts that plan have the same timestamp: it is to the microsecond.
        now = EPOCH + timedelta(microseconds=next(self._world.numbers))
        self._pins = pins or Pins(
            predicted_at=now, snapshot_time=now, model_version="v3", model=BLOB
        )
        return self._pins

    async def append(self) -> tuple[tuple[str, ...], int]:
        names = await self._ask("append", lambda: self._world.fill(self._pins))
        return names, ROWS

    async def commit(self, record: RunRecord) -> bool:
        try:
            await self._ask("commit", lambda: self._world.commit(record.streams))
        except NoSuchStreams:
            there = await self.count(record)
            if there == record.rows:
                return True
            if there:
                raise IntegrityError("Some of the rows are there.") from None
            return False
        return True

    async def count(self, record: RunRecord) -> int:
        return await self._ask("count", lambda: self._world.count(record.pins))

    async def _ask(self, name: str, apply: Callable[[], Any]) -> Any:
        return await self._world.ask(self._instance, name, apply)

    def begun(self, record: RunRecord) -> None:
        pass

    def progress(self) -> tuple[int, int | None]:
        return 0, None

    def result(self, record: RunRecord) -> PredictResult:
        # Of the record alone, so that whoever tells it tells the same.
        return told_of(record, ", ".join(record.streams))

    def problem(self, error: BaseException) -> Problem:
        return problem_of(error if isinstance(error, Exception) else Unavailable("It ended."))


class TakesGoneForNotCommitted(Prediction):
    """The second mutant: does not look for rows where the streams are gone."""

    async def count(self, record: RunRecord) -> int:
        return 0


def some(most: int) -> st.SearchStrategy[int]:
    """Which of several: taken modulo their number, since that changes."""
    return st.integers(0, most - 1)


def pick[T](several: list[T], which: int) -> T:
    return several[which % len(several)]


class Schedules(RuleBasedStateMachine):
    """One run id, several instances, and everything that may happen to them."""

    prediction: type[Prediction] = Prediction

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.world = World(self.loop)

    # What callers and instances do.

    @initialize()
    def begin(self) -> None:
        self.start(0.0)

    @precondition(lambda self: len(self.under_way) < MOST_INSTANCES)
    @rule(skew=st.sampled_from([-LEASE / 2, 0.0, LEASE / 2]))
    def called(self, skew: float) -> None:
        self.start(skew)

    @precondition(lambda self: len(self.under_way) < MOST_INSTANCES)
    @rule(calls=st.integers(1, 10))
    def taken_over(self, calls: int) -> None:
        self.wait(2 * LEASE)
        self.undisturbed(self.start(0.0), calls)

    def start(self, skew: float) -> Instance:
        instance = Instance(len(self.world.instances), skew)
        self.world.instances.append(instance)
        self.loop.create_task(self._carry_out(instance))
        self.loop.settle()
        return instance

    async def _carry_out(self, instance: Instance) -> None:
        store, clock = Store(self.world, instance), Clock(self.world, instance)
        work = self.prediction(self.world, instance)
        try:
            with anyio.CancelScope() as instance.scope:
                instance.outcome = await write_once(
                    store, work, REQUEST, RUN_ID, Lease(LEASE, clock)
                )
            if instance.scope.cancelled_caught:
                instance.outcome = Unavailable("The caller went away.")
        except BaseException as error:
            instance.outcome = error

    @precondition(lambda self: self.under_way)
    @rule(which=some(MOST_INSTANCES))
    def caller_goes_away(self, which: int) -> None:
        self.loop.call_soon(pick(self.under_way, which).scope.cancel)
        self.loop.settle()

    @precondition(lambda self: self.under_way)
    @rule(which=some(MOST_INSTANCES), arrives=st.booleans())
    def killed(self, which: int, arrives: bool) -> None:
        instance = pick(self.under_way, which)
        instance.alive = False
        for call in [each for each in self.world.waiting if each.caller is instance]:
            self.world.waiting.remove(call)
            if arrives:
                self.world.late.append(call.apply)

    @rule(seconds=st.sampled_from([LEASE / 3, LEASE, 2 * LEASE]))
    def time_passes(self, seconds: float) -> None:
        self.wait(seconds)

    def wait(self, seconds: float) -> None:
        self.loop.now += seconds
        self.loop.settle()

    # What becomes of a call.

    @precondition(lambda self: self.under_way)
    @rule(which=some(MOST_INSTANCES), calls=st.integers(1, 10))
    def goes_on(self, which: int, calls: int) -> None:
        self.undisturbed(pick(self.under_way, which), calls)

    @precondition(lambda self: self.under_way)
    @rule(which=some(MOST_INSTANCES))
    def is_left_alone(self, which: int) -> None:
        self.undisturbed(pick(self.under_way, which), ENOUGH)

    @precondition(lambda self: self.world.waiting)
    @rule(which=some(8))
    def answered(self, which: int) -> None:
        self._answer(pick(self.world.waiting, which))

    @precondition(lambda self: self.world.waiting)
    @rule(which=some(8))
    def fails(self, which: int) -> None:
        self._end(pick(self.world.waiting, which), Unavailable("no answer"))

    @precondition(lambda self: self.world.waiting)
    @rule(which=some(8))
    def fails_and_arrives_later(self, which: int) -> None:
        call = pick(self.world.waiting, which)
        self.world.late.append(call.apply)
        self._end(call, Unavailable("no answer"))

    @precondition(lambda self: self.world.waiting)
    @rule(which=some(8), asked_again=st.booleans())
    def answer_is_lost(self, which: int, asked_again: bool) -> None:
        """Where the client asks again by itself, a write finds another generation: its own."""
        call = pick(self.world.waiting, which)
        self._apply(call.apply)
        again = asked_again and call.name == "write"
        self._end(call, Lost() if again else Unavailable("no answer"))

    @precondition(lambda self: self.world.late)
    @rule(which=some(8))
    def arrives_late(self, which: int) -> None:
        self.arrive(pick(self.world.late, which))

    def arrive(self, apply: Callable[[], Any]) -> None:
        self.world.late.remove(apply)
        self._apply(apply)

    @precondition(lambda self: self.world.streams)
    @rule()
    def streams_expire(self) -> None:
        """What they held stays in the table, where it was committed."""
        self.world.streams.clear()

    # How a schedule goes on.

    @property
    def under_way(self) -> list[Instance]:
        return [instance for instance in self.world.instances if instance.under_way]

    def undisturbed(self, instance: Instance, calls: int) -> None:
        """Answers the next so many calls of an instance."""
        for _ in range(calls):
            waiting = [each for each in self.world.waiting if each.caller is instance]
            if not waiting:
                return
            self._answer(waiting[0])

    def _answer(self, call: Call) -> None:
        try:
            told = call.apply()
        except (Lost, NoSuchStreams) as refusal:
            told = refusal
        self._end(call, told)

    def _end(self, call: Call, told: Any) -> None:
        self.world.waiting.remove(call)
        if isinstance(told, Exception):
            call.answer.set_exception(told)
        else:
            call.answer.set_result(told)
        self.loop.settle()

    def _apply(self, apply: Callable[[], Any]) -> None:
        # Nobody waits for what the server says.
        with contextlib.suppress(Lost, NoSuchStreams):
            apply()

    # What has to hold.

    @invariant()
    def rows_are_there_once_or_not_at_all(self) -> None:
        rows = self.world.rows
        assert not rows or rows == Counter(range(ROWS)), rows

    @invariant()
    def whoever_is_told_of_success_is_told_of_these_rows(self) -> None:
        results = {i.outcome for i in self.world.instances if isinstance(i.outcome, PredictResult)}
        assert len(results) <= 1
        for result in results:
            assert result.message == ", ".join(self.world.committed)

    @invariant()
    def whoever_is_told_of_a_failure_may_try_again(self) -> None:
        for instance in self.world.instances:
            match instance.outcome:
                case None | PredictResult() | Unavailable() | Conflict():
                    pass
                case IntegrityError() as error if "keeps losing" in str(error):
                    pass
                case wrong:
                    raise AssertionError(repr(wrong)) from wrong

    def teardown(self) -> None:
        try:
            if not self.wrong():
                self.ends_well()
        finally:
            self.close()

    def wrong(self) -> bool:
        """Whether it is known already that something is wrong."""
        try:
            self.check()
        except AssertionError:
            return True
        return False

    def check(self) -> None:
        self.rows_are_there_once_or_not_at_all()
        self.whoever_is_told_of_success_is_told_of_these_rows()
        self.whoever_is_told_of_a_failure_may_try_again()

    def ends_well(self) -> None:
        """An undisturbed call writes the rows, whatever comes late and wakes up after it."""
        result = self.until_done()
        assert self.world.rows == Counter(range(ROWS))
        assert self.world.record.record.state is RunState.COMMITTED

        while self.world.late:
            self.arrive(self.world.late[0])
        for _ in range(ENOUGH):
            if not self.under_way:
                break
            self.undisturbed(self.under_way[0], ENOUGH)
            self.check()
        assert not self.under_way

        assert self.until_done() == result
        self.check()

    def until_done(self) -> PredictResult:
        """Calls until there is a result, each time when the lease has run out."""
        for _ in range(5):
            self.wait(2 * LEASE)
            instance = self.start(0.0)
            self.undisturbed(instance, ENOUGH)
            self.check()
            if isinstance(instance.outcome, PredictResult):
                return instance.outcome
            assert isinstance(instance.outcome, Conflict), instance.outcome
        raise AssertionError("the lease does not run out")

    def close(self) -> None:
        """Ends the tasks of those that were killed."""
        self.world.over = True
        for _ in range(10):
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.settle()
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()


# The same schedules each time, so that nobody's change fails by what another one left.
EXAMPLES = settings(
    max_examples=1000,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# A mutant is found, and what it does is not made any simpler.
HUNT = settings(EXAMPLES, phases=[Phase.generate], report_multiple_bugs=False)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What goes wrong is planned, and there are thousands of it."""
    configure_logging()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_a_run_id_writes_once_through_a_thousand_schedules() -> None:
    run_state_machine_as_test(Schedules, settings=EXAMPLES)


def test_they_find_a_commit_without_its_fence() -> None:
    with without_fence(), pytest.raises(AssertionError, match="Counter"):
        run_state_machine_as_test(Schedules, settings=HUNT)


def test_they_find_streams_that_are_gone_taken_for_not_committed() -> None:
    class Mutated(Schedules):
        prediction = TakesGoneForNotCommitted

    with pytest.raises(AssertionError, match="Counter"):
        run_state_machine_as_test(Mutated, settings=HUNT)


# Whose result is told


class Shelf:
    """Records by run id, in memory: see `Store`."""

    def __init__(self) -> None:
        self.kept: dict[str, Entry] = {}
        self.reads_left = 100

    async def read(self, run_id: str) -> Entry | None:
        if not self.reads_left:
            raise Unavailable("The shelf is out of reach.")
        self.reads_left -= 1
        return self.kept.get(run_id)

    async def write(self, record: RunRecord, generation: int) -> Entry:
        there = self.kept.get(record.run_id)
        if generation != (there.generation if there else 0):
            raise Lost
        entry = self.kept[record.run_id] = Entry(record, generation + 1)
        return entry


class StoppedClock:
    """A clock that only moves when it is told to: see `Clock`."""

    def __init__(self) -> None:
        self.time = EPOCH

    def now(self) -> datetime:
        return self.time

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep_forever()


class Overtaken:
    """A run that somebody else takes over while it commits: see `Work`."""

    def __init__(
        self,
        name: str,
        meanwhile: Callable[[], Any],
        *,
        before: Callable[[], Any] = anyio.lowlevel.checkpoint,
    ) -> None:
        self._name = name
        self._before = before
        self._meanwhile = meanwhile
        self.pins: Pins | None = None

    async def plan(self, pins: Pins | None) -> Pins:
        self.pins = pins
        return pins or Pins(predicted_at=EPOCH, snapshot_time=EPOCH, model_version="v3", model=BLOB)

    async def append(self) -> tuple[tuple[str, ...], int]:
        await self._before()
        return ("stream",), ROWS

    async def commit(self, record: RunRecord) -> bool:
        await self._meanwhile()
        return True

    def begun(self, record: RunRecord) -> None:
        pass

    def progress(self) -> tuple[int, int | None]:
        return 0, None

    def result(self, record: RunRecord) -> PredictResult:
        return told_of(record, self._name)

    def problem(self, error: BaseException) -> Problem:
        return problem_of(Unavailable("It ended."))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


@pytest.fixture
def carry_out(shelf: Shelf, clock: StoppedClock) -> Callable[[Overtaken], Any]:
    """Carries out one run id, however often, after the lease of whoever had it before."""

    async def carry_out(work: Overtaken) -> PredictResult:
        clock.time += timedelta(seconds=2 * LEASE)
        return await write_once(shelf, work, REQUEST, RUN_ID, Lease(LEASE, clock))

    return carry_out


@pytest.mark.anyio
async def test_who_was_overtaken_while_committing_tells_what_the_other_has_stored(
    carry_out: Callable[[Overtaken], Any],
) -> None:
    async def overtake() -> None:
        await carry_out(Overtaken("the other", anyio.lowlevel.checkpoint))

    told = await carry_out(Overtaken("the first", overtake))

    assert told.message == "the other"
    assert await carry_out(Overtaken("a third", overtake)) == told


@pytest.mark.anyio
async def test_who_was_overtaken_by_one_that_is_not_done_has_its_caller_ask_again(
    carry_out: Callable[[Overtaken], Any],
) -> None:
    async def die() -> None:
        raise Unavailable("the other is gone")

    async def overtake() -> None:
        with pytest.raises(Unavailable):
            await carry_out(Overtaken("the other", die))

    with pytest.raises(TakenOver):
        await carry_out(Overtaken("the first", overtake))

    told = await carry_out(Overtaken("a third", anyio.lowlevel.checkpoint))
    assert told.message == "a third"


@pytest.mark.anyio
async def test_who_was_overtaken_and_can_not_read_what_the_other_tells_tells_of_the_same_rows(
    carry_out: Callable[[Overtaken], Any], shelf: Shelf
) -> None:
    async def overtake() -> None:
        await carry_out(Overtaken("the other", anyio.lowlevel.checkpoint))
        shelf.reads_left = 1  # In which the first finds that he was overtaken.

    told = await carry_out(Overtaken("the first", overtake))

    assert told.rows == ROWS
    assert shelf.reads_left == 0


@pytest.mark.anyio
async def test_a_commit_that_failed_is_told_until_it_is_done(
    carry_out: Callable[[Overtaken], Any], shelf: Shelf
) -> None:
    async def die() -> None:
        raise IntegrityError("Some of the rows are there.")

    with pytest.raises(IntegrityError):
        await carry_out(Overtaken("the first", die))
    left = shelf.kept[RUN_ID].record
    await carry_out(Overtaken("the second", anyio.lowlevel.checkpoint))
    done = shelf.kept[RUN_ID].record

    assert (left.state, left.error) == (RunState.PREPARED, problem_of(Unavailable("It ended.")))
    assert (done.state, done.error) == (RunState.COMMITTED, None)


@pytest.mark.anyio
@pytest.mark.parametrize(("days", "kept"), [(6, True), (8, False)])
async def test_pins_that_nobody_can_read_by_any_more_are_made_anew(
    carry_out: Callable[[Overtaken], Any],
    shelf: Shelf,
    clock: StoppedClock,
    days: int,
    kept: bool,
) -> None:
    await carry_out(Overtaken("the first", anyio.lowlevel.checkpoint))
    entry = shelf.kept[RUN_ID]
    left = entry.record.model_copy(update={"state": RunState.RUNNING, "result": None})
    shelf.kept[RUN_ID] = Entry(left, entry.generation)
    clock.time += timedelta(days=days)

    work = Overtaken("the second", anyio.lowlevel.checkpoint)
    await carry_out(work)

    assert work.pins == (left.pins if kept else None)
    assert shelf.kept[RUN_ID].record.state is RunState.COMMITTED


@pytest.mark.anyio
@pytest.mark.parametrize("hangs", [False, True])
async def test_a_renewal_that_goes_wrong_in_whatever_way_ends_no_run(hangs: bool) -> None:
    class Clock(StoppedClock):
        async def sleep(self, seconds: float) -> None:
            await anyio.sleep(0.01)

    class Breaks(Shelf):
        renewals = 0

        async def write(self, record: RunRecord, generation: int) -> Entry:
            if generation and record.state is RunState.RUNNING:
                self.renewals += 1
                if hangs and self.renewals == 1:
                    await anyio.sleep_forever()
                if self.renewals < 3:
                    raise ValueError("That is no answer.")
                renewed.set()
            return await super().write(record, generation)

    renewed = anyio.Event()
    work = Overtaken("it", anyio.lowlevel.checkpoint, before=renewed.wait)
    with anyio.fail_after(10):
        told = await write_once(Breaks(), work, REQUEST, RUN_ID, Lease(0.3, Clock()))

    assert told.message == "it"
