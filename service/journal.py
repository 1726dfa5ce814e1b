"""The run journal: one JSON object a run, in the runs bucket of its environment.

Each write names the generation that it replaces, so of two who go on from the same record only one
does. What the records are for, and who writes which when, is in `service/once.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import anyio
from gcloud.aio.storage import Storage
from pydantic import BaseModel, ConfigDict, ValidationError

from mlsys.errors import Changed, Conflict, IntegrityError, NotFound
from mlsys.gcs import Blob, find_blob, list_blobs, read_blob, write_blob
from mlsys.tasks import task_group
from service.contract import PredictRequest, PredictResult, Problem, RunInfo, RunState

_FOLDER = "runs/"
_MOST_READS = 16


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
        """See `Store`. Raises IntegrityError for an object that is no record."""
        while True:
            blob = await find_blob(self._objects, self._bucket, _path(run_id))
            if blob is None:
                return None
            try:
                data = await read_blob(self._objects, blob, try_seconds=self._try_seconds)
            except (Changed, NotFound):
                continue  # Written between the two calls: look again.
            return Entry(_record(data, blob), blob.generation)

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
        keys = [
            (blob.labels.get("started", ""), blob)
            async for blob in list_blobs(self._objects, self._bucket, _FOLDER)
            if state is None or blob.labels.get("state") == state
        ]
        keys.sort(key=lambda key: (key[0], key[1].path), reverse=True)
        marks = [f"{started}~{blob.path.removeprefix(_FOLDER)}" for started, blob in keys]
        first = 0 if before is None else sum(mark >= before for mark in marks)
        page = [blob for _, blob in keys[first : first + most]]
        more = len(keys) > first + most
        return await self._infos(page), marks[first + most - 1] if more else None

    async def _infos(self, blobs: list[Blob]) -> list[RunInfo]:
        found: dict[str, RunInfo] = {}
        limiter = anyio.CapacityLimiter(_MOST_READS)

        async def read(path: str) -> None:
            async with limiter:
                entry = await self.read(path.removeprefix(_FOLDER).removesuffix(".json"))
            if entry is not None:
                found[path] = entry.record.info()

        async with task_group() as tasks:
            for blob in blobs:
                tasks.start_soon(read, blob.path)
        return [found[blob.path] for blob in blobs if blob.path in found]


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
