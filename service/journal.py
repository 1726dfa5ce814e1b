"""The run journal: one JSON object a run, in the runs bucket of its environment.

Each write names the generation that it replaces, so of two who go on from the same record only one
does. What the records are for, and who writes which when, is in `service/once.py`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import anyio
import structlog
from gcloud.aio.storage import Storage
from pydantic import BaseModel, ConfigDict, ValidationError

from mlsys.errors import Changed, Conflict, IntegrityError, NotFound
from mlsys.gcs import Blob, find_blob, list_blobs, read_blob, write_blob
from mlsys.tasks import task_group
from service.contract import PredictRequest, PredictResult, Problem, RunInfo, RunState

_log = structlog.get_logger(__name__)

_FOLDER = "runs/"
# Between the parts of a page's mark: when a run started, and the name of its record.
_MARK = "~"
_MOST_READS = 16
# How often a record is looked up that was written anew each time before it was read. Owners do so
# a few times a minute.
_MOST_LOOKS = 5
_LOOK_SECONDS = 0.2


class Pins(BaseModel):
    """What every attempt of a run has in common, so that each would write the same rows.

    Without `metadata`, the model had no metadata.json when the run began, or the record is older
    than this member.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    predicted_at: datetime
    snapshot_time: datetime
    model_version: str
    model: Blob
    metadata: Blob | None = None


class RunRecord(BaseModel):
    """A run as the journal has it. `streams` and `rows` are known from PREPARED on."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    state: RunState
    fingerprint: str
    request: PredictRequest
    pins: Pins
    epoch: int
    nonce: str
    lease_until: datetime
    started_at: datetime
    updated_at: datetime
    rows_done: int = 0
    rows_total: int | None = None
    streams: tuple[str, ...] = ()
    rows: int | None = None
    result: PredictResult | None = None
    error: Problem | None = None

    def info(self) -> RunInfo:
        """What people are shown of it."""
        open_still = self.state in (RunState.RUNNING, RunState.PREPARED)
        return RunInfo(
            run_id=self.run_id,
            state=self.state,
            request=self.request,
            model_version=self.pins.model_version,
            model_generation=self.pins.model.generation,
            started_at=self.started_at,
            updated_at=self.updated_at,
            attempts=self.epoch,
            rows_done=self.rows_done,
            rows_total=self.rows_total,
            result=self.result,
            error=self.error,
            abandoned=open_still and self.lease_until < datetime.now(UTC),
        )


@dataclass(frozen=True)
class Entry:
    """A record, and the generation of its object."""

    record: RunRecord
    generation: int


class Lost(Exception):
    """The object has another generation than the one that was to be replaced."""


class Store(Protocol):
    """Where records are kept."""

    async def read(self, run_id: str) -> Entry | None:
        """The record of a run, None where there is none."""

    async def write(self, record: RunRecord, generation: int) -> Entry:
        """Replaces the record that has that generation; 0: where there is none yet.

        Raises:
            Lost: it has another by now.
        """


class Journal:
    """The records in one bucket. Raises NotFound where there is no such bucket.

    Args:
        try_seconds: how long a try of a call may take that carries a record, 2 KB or so: one that
            hangs is to be tried again before the lease that it renews runs out.
    """

    def __init__(self, objects: Storage, bucket: str, *, try_seconds: float) -> None:
        self._objects = objects
        self._bucket = bucket
        self._try_seconds = try_seconds

    async def read(self, run_id: str) -> Entry | None:
        """See `Store`.

        Raises:
            IntegrityError: the object is no record.
            Changed: it is another each time, or arrives damaged.
        """
        path, seconds = _path(run_id), self._try_seconds
        for looks in range(1, _MOST_LOOKS + 1):
            blob = await find_blob(self._objects, self._bucket, path, try_seconds=seconds)
            if blob is None:
                return None
            try:
                data = await read_blob(self._objects, blob, try_seconds=seconds)
            except (Changed, NotFound) as error:  # Written between the two calls, most likely.
                changed = error
                await anyio.sleep(_LOOK_SECONDS * looks)
                continue
            return Entry(_record(data, blob), blob.generation)
        raise Changed(f"The record of the run {run_id} can't be read. Try again.") from changed

    async def write(self, record: RunRecord, generation: int) -> Entry:
        """See `Store`."""
        try:
            blob = await write_blob(
                self._objects,
                self._bucket,
                _path(record.run_id),
                record.model_dump_json(exclude_none=True).encode(),
                "application/json",
                if_generation=generation,
                labels={"state": record.state, "started": record.started_at.isoformat()},
                try_seconds=self._try_seconds,
            )
        except Conflict:
            raise Lost from None
        return Entry(record, blob.generation)

    async def runs(
        self, *, state: RunState | None, before: str | None, most: int
    ) -> tuple[list[RunInfo], str | None]:
        """Runs, newest first, and where the next page begins; None: there are no more.

        Args:
            state: only those; None: all.
            before: where this page begins, as the one before it told.
        """
        place = None if before is None else _place(before)
        # The oldest is on top, and goes as soon as there are more than the page and its successor.
        newest: list[tuple[str, str]] = []
        async for blob in list_blobs(self._objects, self._bucket, _FOLDER):
            if state is not None and blob.labels.get("state") != state:
                continue
            key = (blob.labels.get("started", ""), blob.path.removeprefix(_FOLDER))
            if place is None or key < place:
                heapq.heappush(newest, key)
                if len(newest) > most + 1:
                    heapq.heappop(newest)
        newest.sort(reverse=True)
        page = newest[:most]
        more = len(newest) > most
        return await self._infos([name for _, name in page]), _MARK.join(page[-1]) if more else None

    async def _infos(self, names: list[str]) -> list[RunInfo]:
        found: dict[str, RunInfo] = {}
        limiter = anyio.CapacityLimiter(_MOST_READS)

        async def read(name: str) -> None:
            async with limiter:
                try:
                    entry = await self.read(name.removesuffix(".json"))
                except IntegrityError as error:
                    _log.warning("not a run", detail=str(error))
                    return
            if entry is not None:
                found[name] = entry.record.info()

        async with task_group() as tasks:
            for name in names:
                tasks.start_soon(read, name)
        return [found[name] for name in names if name in found]


def _place(mark: str) -> tuple[str, str]:
    started, _, name = mark.partition(_MARK)
    return started, name


def _path(run_id: str) -> str:
    return f"{_FOLDER}{run_id}.json"


def _record(data: bytes, blob: Blob) -> RunRecord:
    try:
        return RunRecord.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(
            f"gs://{blob.bucket}/{blob.path} is no record of a run. Move it away, or use another "
            "run_id."
        ) from error
