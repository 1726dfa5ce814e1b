"""A run id writes once: the protocol, from the request to the stored answer.

    RUNNING ── fence ──► PREPARED ── commit ──► COMMITTED
       │ ▲                   │
       │ └─────────┐         │ streams gone, none of their rows there
       ▼           │         ▼
     nothing written ──► FAILED

A record has an owner, who renews its lease; whoever finds the lease run out takes the run over,
with the same pins. An owner who was taken for dead has his next write refused, and stops: the last
such write, from RUNNING to PREPARED, is the fence before the commit. From PREPARED on it only goes
forward, with the streams that the record names, whoever does it.

BigQuery and Cloud Storage are known here as `Work` and `Store` alone, so that a test can stop the
protocol, kill it or lose an answer at each of its waits.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

import anyio
import structlog

from mlsys.errors import IntegrityError, RunMismatch, TakenOver, UnderWay
from mlsys.tasks import task_group
from service.contract import PredictRequest, PredictResult, Problem, RunState
from service.journal import Entry, Lost, Pins, RunRecord, Store

_log = structlog.get_logger(__name__)

# How often a run begins anew in one call because its streams are gone: they last for hours.
_MOST_ATTEMPTS = 3
_LAST_WORDS_SECONDS = 5
# https://cloud.google.com/bigquery/docs/time-travel
_LONGEST_TIME_TRAVEL = timedelta(days=7)


class Clock(Protocol):
    """What time it is, and waiting."""

    def now(self) -> datetime: ...

    async def sleep(self, seconds: float) -> None: ...


class Work(Protocol):
    """What a run does beside keeping its record."""

    async def plan(self, pins: Pins | None) -> Pins:
        """Settles what to do, by these pins where an earlier attempt has set them."""

    async def append(self) -> tuple[tuple[str, ...], int]:
        """Fills new streams; returns their names and the number of rows in them."""

    async def commit(self, record: RunRecord) -> bool:
        """Makes the rows of the record's streams visible, or finds that they are.

        Returns:
            False: the streams are gone, and none of their rows are there.
        """

    def begun(self, record: RunRecord) -> None:
        """Told as soon as the record is ours."""

    def progress(self) -> tuple[int, int | None]:
        """Rows done, and in all where known."""

    def result(self, record: RunRecord) -> PredictResult:
        """What the caller is told of a run that is committed."""

    def problem(self, error: BaseException) -> Problem:
        """What the caller is told of a run that failed."""


def fingerprint(request: PredictRequest) -> str:
    """What tells one request from another, its run id aside."""
    parameters = request.model_dump_json(exclude={"run_id"}, exclude_none=True)
    return hashlib.sha256(parameters.encode()).hexdigest()


def check(record: RunRecord | None, request: PredictRequest, now: datetime) -> None:
    """Raises unless whoever sends `request` may go on from `record`.

    Raises:
        RunMismatch: the run has other parameters.
        UnderWay: somebody works on it.
    """
    if record is None:
        return
    if record.fingerprint != fingerprint(request):
        raise RunMismatch.of(record.run_id)
    left = (record.lease_until - now).total_seconds()
    if record.state in (RunState.RUNNING, RunState.PREPARED) and left > 0:
        raise UnderWay(
            f"The run {record.run_id} is under way. Ask for it again, or use another run_id.",
            retry_after=left,
        )


@dataclass(frozen=True)
class Lease:
    """How long a record is its owner's without a word of him, and by which clock."""

    seconds: float
    clock: Clock

    def until(self) -> datetime:
        return self.clock.now() + timedelta(seconds=self.seconds)


async def write_once(
    store: Store, work: Work, request: PredictRequest, run_id: str, lease: Lease
) -> PredictResult:
    """Carries a run out, unless it has been: then its result is told again.

    Raises:
        RunMismatch, UnderWay: see `check`.
        TakenOver: somebody else goes on with the run.
        IntegrityError: some rows of the run are there and some are not.
        Whatever `work` raises. From PREPARED on the run is only done when it is committed: call
        again with the same run id.
    """
    for _ in range(_MOST_ATTEMPTS):
        entry = await store.read(run_id)
        check(entry.record if entry else None, request, lease.clock.now())
        if entry is not None and entry.record.state is RunState.COMMITTED:
            return _stored(entry.record)
        claimed = await _claim(store, work, request, run_id, entry, lease)
        work.begun(claimed.record)
        if (result := await _carry_on(store, work, claimed, lease)) is not None:
            return result
    raise IntegrityError("BigQuery keeps losing the streams of this run. Nothing was written.")


def _stored(record: RunRecord) -> PredictResult:
    if record.result is None:
        raise IntegrityError(f"The journal has no result of the run {record.run_id}.")
    return record.result


async def _claim(
    store: Store,
    work: Work,
    request: PredictRequest,
    run_id: str,
    entry: Entry | None,
    lease: Lease,
) -> Entry:
    """Makes the record ours: a new one, or that of an owner who is gone."""
    before = entry.record if entry else None
    now = lease.clock.now()
    if before is not None and before.state is RunState.PREPARED:
        claimed = before.model_copy(
            update={
                "epoch": before.epoch + 1,
                "nonce": uuid.uuid4().hex,
                "lease_until": lease.until(),
                "updated_at": now,
                "error": None,
            }
        )
    else:
        # A run that failed has written nothing, so it may see the table as it is now.
        earlier = before.pins if before and before.state is RunState.RUNNING else None
        if earlier is not None and now - earlier.snapshot_time > _LONGEST_TIME_TRAVEL:
            earlier = None  # Nor has this one, and nobody can read those rows any more.
        pins = await work.plan(earlier)
        claimed = RunRecord(
            run_id=run_id,
            state=RunState.RUNNING,
            fingerprint=fingerprint(request),
            request=request,
            pins=pins,
            epoch=before.epoch + 1 if before else 1,
            nonce=uuid.uuid4().hex,
            lease_until=lease.until(),
            started_at=now,
            updated_at=lease.clock.now(),
            rows_total=work.progress()[1],
        )
    try:
        return await _replace(store, claimed, entry.generation if entry else 0)
    except Lost:
        raise UnderWay(
            f"The run {run_id} was begun by somebody else just now. Ask for it again.",
            retry_after=lease.seconds,
        ) from None


async def _replace(store: Store, record: RunRecord, generation: int) -> Entry:
    """Writes a record over one of ours: an answer may have been lost, and the write not.

    Raises:
        Lost: what is there is somebody else's.
    """
    while True:
        try:
            return await store.write(record, generation)
        except Lost:
            there = await store.read(record.run_id)
            if there is None or there.record.nonce != record.nonce:
                raise
            if there.record == record:
                return there
            generation = there.generation


async def _carry_on(store: Store, work: Work, claimed: Entry, lease: Lease) -> PredictResult | None:
    """From a claimed record to its result; None: its streams are gone, and it may begin anew."""
    with anyio.CancelScope() as scope:
        async with _held(store, work, claimed, lease) as owner:
            if owner.record.state is RunState.RUNNING:
                try:
                    streams, rows = await work.append()
                except BaseException as error:
                    await owner.last_words(state=RunState.FAILED, error=work.problem(error))
                    raise
                # From here on it is seen through, also when the caller goes away.
                scope.shield = True
                # The fence: whoever was taken over meanwhile gets no further.
                await owner.write(state=RunState.PREPARED, streams=streams, rows=rows)
            scope.shield = True
            return await _commit(store, work, owner)
    raise AssertionError("nobody cancels this scope")


async def _commit(store: Store, work: Work, owner: _Owner) -> PredictResult | None:
    try:
        committed = await work.commit(owner.record)
    except BaseException as error:
        await owner.last_words(error=work.problem(error))
        raise
    if not committed:
        await owner.write(state=RunState.FAILED, streams=(), rows=None)
        return None
    result = work.result(owner.record)
    try:
        await owner.write(state=RunState.COMMITTED, result=result)
    except TakenOver:
        # What the other tells of these rows is what everybody is told from now on.
        try:
            entry = await store.read(owner.record.run_id)
        except Exception as error:
            _log.warning("result of another owner not read", detail=str(error))
            return result
        if entry is None or entry.record.state is not RunState.COMMITTED:
            raise
        return _stored(entry.record)
    except Exception as error:
        # The rows are there. Whoever asks next finds that out again.
        _log.warning("result not journalled", detail=str(error))
    return result


class _Owner:
    """A record that is ours, as long as our writes are taken."""

    def __init__(self, store: Store, work: Work, entry: Entry, lease: Lease) -> None:
        self._store = store
        self._work = work
        self._entry = entry
        self._lease = lease
        self._one_by_one = anyio.Lock()
        self._done = False

    @property
    def record(self) -> RunRecord:
        return self._entry.record

    async def write(self, **changes: Any) -> None:
        """Changes the record, and renews its lease unless the run has come to its end.

        Raises:
            TakenOver: it is not ours any more.
        """
        async with self._one_by_one:
            if self._done:
                return
            rows_done, _ = self._work.progress()
            news = {
                "lease_until": self._lease.until(),
                "updated_at": self._lease.clock.now(),
                "rows_done": rows_done,
            } | changes
            record = self.record.model_copy(update=news)
            try:
                self._entry = await _replace(self._store, record, self._entry.generation)
            except Lost:
                raise TakenOver(
                    f"The run {record.run_id} was taken over by another instance, which goes on "
                    "with it. Ask for it again.",
                    retry_after=self._lease.seconds,
                ) from None
            self._done = record.state in (RunState.COMMITTED, RunState.FAILED)

    async def keep(self) -> None:
        """Renews the lease for as long as it is let."""
        third = pause = self._lease.seconds / 3
        while True:
            await self._lease.clock.sleep(pause)
            pause = third / 4
            # One that takes longer would store a lease that is half over: it is made anew.
            with anyio.move_on_after(third) as bounded:
                try:
                    await self.write()
                    pause = third
                except TakenOver:
                    raise
                except Exception as error:
                    # Others may take over once the lease has run out, and then the fence holds.
                    _log.warning("lease not renewed", detail=str(error))
            if bounded.cancelled_caught:
                _log.warning("lease not renewed", detail="no answer in a third of it")

    async def last_words(self, **changes: Any) -> None:
        """Lets go of the record, so that nobody has to wait for the lease to run out."""
        with anyio.move_on_after(_LAST_WORDS_SECONDS, shield=True):
            try:
                await self.write(lease_until=self._lease.clock.now(), **changes)
            except Exception as error:
                _log.warning("run not let go", detail=str(error))


@asynccontextmanager
async def _held(store: Store, work: Work, entry: Entry, lease: Lease) -> AsyncIterator[_Owner]:
    owner = _Owner(store, work, entry, lease)
    async with task_group() as tasks:
        tasks.start_soon(owner.keep)
        yield owner
        tasks.cancel_scope.cancel()
