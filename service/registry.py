"""What is in a model bucket, written into the registry table.

    list the bucket → sort its objects → read each metadata.json → MERGE → look at what came of it
                      pure               many at once

A scan may be repeated, run twice at once, or die halfway: what it has written by then is true, and
the next one writes the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import stamina
import structlog
from anyio.streams.memory import MemoryObjectSendStream
from gcloud.aio.storage import Storage
from google.cloud.bigquery import Row, ScalarQueryParameter, SchemaField
from pydantic import ValidationError
from pydantic_core import from_json

from mlsys.clients import Clients
from mlsys.errors import (
    Changed,
    InvalidRequest,
    NotFound,
    OutOfMemory,
    TableMismatch,
    redacted,
)
from mlsys.gcs import Blob, find_blob, list_blobs, read_blob
from mlsys.metadata import ModelMetadata, first_mistake
from mlsys.names import (
    METADATA_FILE,
    MODEL_FILE,
    Environment,
    TableRef,
    artifact_path,
    check_model_name,
    check_version,
    parse_artifact_path,
    shown,
    version_number,
)
from mlsys.settings import Settings
from mlsys.tables import (
    add_columns,
    check_dataset,
    create_table,
    find_table,
    run_statement,
    standard_type,
)
from mlsys.tasks import task_group
from service.contract import RegisteredModel, RegistryCounts, RegistryScan, SkippedObject

COLUMNS = tuple(
    SchemaField.from_api_repr(column)
    for column in json.loads(Path(__file__).with_name("registry_schema.json").read_bytes())
)
"""The registry table: one file for this code and for Terraform, which makes the table.

Columns are only ever added, at the end.
"""

_KEY = ("environment", "model_name", "model_version")
_VERDICT = ("verified", "verification")
_LONGEST_TEXT = 256

# How many reads of metadata.json are under way at once.
_READERS = 32
_LARGEST_METADATA = 1024 * 1024
_READ_TRIES = 3

# BigQuery takes requests of 10 MB, parameters included: https://cloud.google.com/bigquery/quotas.
# That is 2,000 models with 3 KB of metadata each in one MERGE; where there is more, several follow
# each other. The largest metadata.json fits even if each of its characters has to be escaped.
_MERGE_BYTES = 8 * 1024 * 1024

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class FoundModel:
    """A model.pkl in the bucket, and what the metadata.json beside it says, once that is read."""

    name: str
    version: str
    blob: Blob
    metadata_blob: Blob | None = None
    metadata: ModelMetadata = field(default_factory=ModelMetadata)
    metadata_text: str | None = None


Verify = Callable[[FoundModel], Awaitable[str | None]]
"""Asks a generation its golden rows, once: what is wrong with it, None for nothing."""


def registry_table(clients: Clients, settings: Settings, env: Environment) -> TableRef:
    """Where the models of an environment are registered."""
    project = settings.gcp_project_id or clients.bigquery.project
    return TableRef(project, f"mlsys_{env}", "model_registry")


async def scan(
    clients: Clients, settings: Settings, env: Environment, verify: Verify | None = None
) -> RegistryScan:
    """Registers every model in the bucket of an environment, and marks those that are gone.

    Raises:
        NotFound: there is no such bucket or dataset.
        TableMismatch: there is a registry table already, with columns of other types.
        AccessDenied, Unavailable: as the names say.
    """
    begun = time.monotonic()
    registry = _Registry(clients, settings, env)
    bucket = settings.model_bucket(env)
    blobs = [blob async for blob in list_blobs(clients.objects, bucket)]
    models, skipped = sort_objects(blobs)
    await registry.make_ready()
    examined = await registry.examined() if verify else frozenset()
    readers = _Readers(clients.objects, models, skipped, verify, examined)
    await _register(readers, registry)
    deleted, problems = await registry.settle()
    result = RegistryScan(
        env=env,
        bucket=bucket,
        table=str(registry.ref),
        registered=sorted((_registered(m, problems) for m in models), key=_by_version),
        deleted=deleted,
        skipped=sorted(skipped, key=lambda each: each.path),
        counts=RegistryCounts(
            objects=len(blobs), registered=len(models), deleted=len(deleted), skipped=len(skipped)
        ),
        seconds=round(time.monotonic() - begun, 3),
    )
    _log.info("bucket scanned", bucket=bucket, seconds=result.seconds, **dict(result.counts))
    return result


def _registered(
    model: FoundModel, problems: Mapping[tuple[str, str], str | None]
) -> RegisteredModel:
    return RegisteredModel(
        name=model.name,
        version=model.version,
        generation=model.blob.generation,
        problem=problems.get((model.name, model.version)),
    )


def _by_version(model: RegisteredModel) -> tuple[str, int]:
    return model.name, version_number(model.version)


def sort_objects(blobs: Iterable[Blob]) -> tuple[list[FoundModel], list[SkippedObject]]:
    """Tells models, and the metadata beside them, from whatever else is in a bucket."""
    by_path = {blob.path: blob for blob in blobs}
    models, skipped = [], []
    for path, blob in by_path.items():
        if key := parse_artifact_path(path):
            beside = by_path.get(artifact_path(*key, METADATA_FILE))
            models.append(FoundModel(*key, blob, beside))
        elif reason := _why_skipped(path, by_path):
            skipped.append(SkippedObject(path=path, reason=reason))
    return models, skipped


def _why_skipped(path: str, by_path: Mapping[str, Blob]) -> str | None:
    folder, _, file = path.rpartition("/")
    model_path = f"{folder}/{MODEL_FILE}"
    if file == METADATA_FILE and parse_artifact_path(model_path):
        return None if model_path in by_path else f"There is no {MODEL_FILE} beside it."
    name, _, version = folder.partition("/")
    if file == MODEL_FILE and version and "/" not in version:
        try:
            check_model_name(name)
            check_version(version)
        except InvalidRequest as error:
            return str(error)
    return f"It is neither {{name}}/v{{N}}/{MODEL_FILE} nor the {METADATA_FILE} beside one."


async def _register(readers: _Readers, registry: _Registry) -> None:
    send, models = anyio.create_memory_object_stream[_Examined](0)
    with models:
        async with task_group() as tasks:
            with send:
                for _ in range(_READERS):
                    tasks.start_soon(readers.read, send.clone())
            async for model, verdict in models:
                await registry.add(model, verdict)
    await registry.merge(last=True)


class _Readers:
    """Read each metadata.json, and have what is new examined; share one list of models.

    Args:
        skipped: where a metadata.json that can't be used is named.
        examined: the models that `verify` need not see again; see `_Registry.examined`.
    """

    def __init__(
        self,
        objects: Storage,
        models: Iterable[FoundModel],
        skipped: list[SkippedObject],
        verify: Verify | None,
        examined: Collection[tuple[str, int, str | None]],
    ) -> None:
        self._objects = objects
        self._models = iter(models)
        self._skipped = skipped
        self._verify = verify
        self._examined = examined

    async def read(self, send: MemoryObjectSendStream[_Examined]) -> None:
        """Takes models until there are none left."""
        with send:
            for listed in self._models:
                model = await self._with_metadata(listed)
                await send.send((model, await self._verdict(model)))

    async def _with_metadata(self, model: FoundModel) -> FoundModel:
        if model.metadata_blob is None:
            return model
        try:
            data = await _read_metadata(self._objects, model.metadata_blob)
            metadata, text = _parse(data)
        except _Unusable as error:
            path = model.metadata_blob.path
            self._skipped.append(SkippedObject(path=path, reason=f"{error} {_WITHOUT}"))
            return model
        return replace(model, metadata=metadata, metadata_text=text)

    async def _verdict(self, model: FoundModel) -> dict[str, Any]:
        seen = (model.blob.path, model.blob.generation, model.metadata_text) in self._examined
        if self._verify is None or seen or model.metadata.golden is None:
            return {}
        try:
            wrong = await self._verify(model)
        except (NotFound, Changed, OutOfMemory):
            # Deleted or replaced since it was listed, or no room: the next scan sees to that.
            return {}
        told = wrong and "".join(filter(str.isprintable, wrong))
        return {"verified": wrong is None, "verification": told}


_Examined = tuple[FoundModel, dict[str, Any]]

_WITHOUT = "Until it is mended and uploaded again, the model is registered without it."


class _Unusable(Exception):
    """A metadata.json that is skipped; the message says why."""


async def _read_metadata(objects: Storage, blob: Blob) -> bytes:
    try:
        async for attempt in stamina.retry_context(on=Changed, attempts=_READ_TRIES):
            with attempt:
                current = blob if attempt.num == 1 else await _look_up(objects, blob)
                if current.size > _LARGEST_METADATA:
                    raise _Unusable(
                        f"It has {current.size:,} bytes; the service reads {_LARGEST_METADATA:,} "
                        "at most."
                    )
                return await read_blob(objects, current)
    except (Changed, InvalidRequest) as error:
        raise _Unusable(
            "What arrives is never what is stored. Upload it without Content-Encoding."
        ) from error
    except NotFound as error:
        raise _Unusable("It was deleted meanwhile.") from error
    raise AssertionError("the last attempt raises")


async def _look_up(objects: Storage, blob: Blob) -> Blob:
    current = await find_blob(objects, blob.bucket, blob.path)
    if current is None:
        raise NotFound(f"gs://{blob.bucket}/{blob.path} is gone.")
    return current


def _parse(data: bytes) -> tuple[ModelMetadata, str]:
    """Metadata as `/predict` would take it, and as compact JSON without NaN and its like."""
    try:
        metadata = ModelMetadata.model_validate_json(data)
        content = from_json(data)
        return metadata, json.dumps(
            content, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
    except ValidationError as error:
        where, what = first_mistake(error)
        told = f"{shown(where)}: {what}" if where else what
        raise _Unusable(f"It can't be used: {told}.") from error
    except ValueError as error:
        raise _Unusable(f"It can't be used: Invalid JSON: {redacted(str(error))}.") from error


class _Registry:
    """The registry table during one scan."""

    def __init__(self, clients: Clients, settings: Settings, env: Environment) -> None:
        self.ref = registry_table(clients, settings, env)
        self._client = clients.bigquery
        self._env = env
        self._retry_seconds = settings.retry_seconds
        # When the scan began, that is before the bucket was listed: what a later scan has written
        # is newer than what this one knows.
        self._now = datetime.now(UTC)
        self._columns = [column.name for column in COLUMNS]
        self._rows: list[str] = []
        self._bytes = 0

    async def make_ready(self) -> None:
        """Makes the table where there is none, and adds the columns that it lacks."""
        table = await find_table(self._client, self.ref, retry_seconds=self._retry_seconds)
        if table is None:
            await self._create()
            return
        # Names of columns are the same in any case.
        kinds = {column.name.lower(): standard_type(column) for column in table.columns}
        mistyped = [
            f"{each.name} is {kinds[each.name]}, not {each.field_type}"
            for each in COLUMNS
            if kinds.get(each.name, each.field_type) != each.field_type
        ]
        if mistyped:
            raise TableMismatch(
                f"{self.ref} is no registry: {'; '.join(mistyped)}. Rename it; a scan makes a new "
                "one.",
                mistyped_columns=mistyped,
            )
        missing = [each for each in COLUMNS if each.name not in kinds]
        self._columns += [name for name in kinds if name not in self._columns]
        await add_columns(self._client, self.ref, missing, retry_seconds=self._retry_seconds)

    async def _create(self) -> None:
        seconds = self._retry_seconds
        try:
            await check_dataset(self._client, self.ref, retry_seconds=seconds)
        except NotFound as error:
            dataset = f"{self.ref.project}:{self.ref.dataset}"
            raise NotFound(
                f"The dataset {dataset}, which holds the registry, does not exist. Create it with "
                f"Terraform, or with `bq mk --dataset {dataset}`."
            ) from error
        await create_table(self._client, self.ref, COLUMNS, retry_seconds=seconds)

    async def examined(self) -> frozenset[tuple[str, int, str | None]]:
        """What was examined in an earlier scan, whatever came of it: path, generation, metadata."""
        rows = await self._run(_EXAMINED)
        return frozenset((artifact_path(name, f"v{number}"), *told) for name, number, *told in rows)

    async def add(self, model: FoundModel, verdict: Mapping[str, Any]) -> None:
        """Takes a model; writes those taken before where one request can't carry any more."""
        row = json.dumps(self._row(model) | verdict)
        size = len(json.dumps(row))  # As it travels: JSON in a string of JSON.
        if self._bytes + size > _MERGE_BYTES:
            await self.merge(last=False)
        self._rows.append(row)
        self._bytes += size

    def _row(self, model: FoundModel) -> dict[str, Any]:
        blob, metadata = model.blob, model.metadata
        return {
            "model_name": model.name,
            "model_version": version_number(model.version),
            "environment": self._env,
            "gcs_bucket": blob.bucket,
            "file_size_bytes": blob.size,
            "upload_timestamp": blob.created and blob.created.isoformat(),
            "uploader": _printable(blob.uploader),
            "registered_at": self._now.isoformat(),
            "metadata": model.metadata_text,
            "generation": blob.generation,
            "crc32c": blob.crc32c,
            "sha256": _printable(metadata.sha256),
            "sklearn_version": _printable(metadata.sklearn_version),
            "python_version": _printable(metadata.python_version),
        }

    async def merge(self, *, last: bool) -> None:
        """Writes the models taken so far; the last time, also marks those that were not seen."""
        rows, self._rows, self._bytes = self._rows, [], 0
        await self._run(
            _MERGE,
            ScalarQueryParameter("rows", "STRING", f"[{','.join(rows)}]"),
            ScalarQueryParameter("last", "BOOL", last),
        )

    async def settle(self) -> tuple[list[RegisteredModel], dict[tuple[str, str], str | None]]:
        """Leaves one row a model.

        Returns:
            The models that this scan has marked as deleted; and what is wrong with those that are
            not verified, by name and version.
        """
        rows = await self._run(_SETTLE)
        if any(row.copies > 1 for row in rows):
            await self._run(_one_row_each(self._columns))
        deleted = [
            RegisteredModel(
                name=row.model_name, version=f"v{row.model_version}", generation=row.generation
            )
            for row in rows
            if row.gone
        ]
        return deleted, {(row.model_name, f"v{row.model_version}"): row.problem for row in rows}

    async def _run(self, sql: str, *parameters: ScalarQueryParameter) -> list[Row]:
        return await run_statement(
            self._client,
            self.ref,
            sql.replace("{table}", f"`{self.ref}`"),
            (
                ScalarQueryParameter("environment", "STRING", self._env),
                ScalarQueryParameter("now", "TIMESTAMP", self._now),
                *parameters,
            ),
            retry_seconds=self._retry_seconds,
        )


def _printable(text: str | None) -> str | None:
    """What others have written, where a column may hold it: one NUL would fail the whole MERGE."""
    return text if text and text.isprintable() and len(text) <= _LONGEST_TEXT else None


def _listed(form: str, names: Iterable[str]) -> str:
    return ",\n  ".join(form.format(name) for name in names)


_NAMES = [column.name for column in COLUMNS]

# A row says nothing of `deleted_at`, which makes it NULL again.
_ROWS = _listed(
    "{}", (f"CAST(JSON_VALUE(item, '$.{c.name}') AS {c.field_type}) AS {c.name}" for c in COLUMNS)
)

_SAME = "T.generation = S.generation AND IFNULL(T.metadata, '') = IFNULL(S.metadata, '')"

# What a scan has found out is only written over what an earlier one had: of two at once, the one
# that began later is right. A verdict stays for as long as the generation and its metadata do.
_MERGE = f"""
MERGE {{table}} AS T
USING (
  SELECT {_ROWS}
  FROM UNNEST(JSON_QUERY_ARRAY(@rows)) AS item
) AS S
ON {" AND ".join(f"T.{name} = S.{name}" for name in _KEY)}
WHEN MATCHED
  AND IFNULL(T.registered_at <= @now, TRUE) AND IFNULL(T.deleted_at <= @now, TRUE)
THEN UPDATE SET
  {_listed("{0} = S.{0}", (n for n in _NAMES if n not in (*_KEY, *_VERDICT)))},
  {_listed(f"{{0}} = IF({_SAME} AND S.verified IS NULL, T.{{0}}, S.{{0}})", _VERDICT)}
WHEN NOT MATCHED THEN INSERT ({_listed("{}", _NAMES)}) VALUES ({_listed("S.{}", _NAMES)})
WHEN NOT MATCHED BY SOURCE
  AND @last AND T.environment = @environment
  AND T.deleted_at IS NULL AND IFNULL(T.registered_at < @now, TRUE)
THEN UPDATE SET deleted_at = @now
"""

# To BigQuery, two MERGEs that only insert don't collide, so that two first scans at once may insert
# the same model: https://cloud.google.com/bigquery/docs/data-manipulation-language (DML statement
# conflicts). Whichever looks last sees both rows. They may be the same in every column by then, so
# only writing them anew gets rid of one.
_SETTLE = """
SELECT
  model_name, model_version, MAX(generation) AS generation, COUNT(*) AS copies,
  LOGICAL_OR(IFNULL(deleted_at = @now, FALSE)) AS gone,
  MAX(IF(verified, NULL, verification)) AS problem
FROM {table}
WHERE environment = @environment
GROUP BY model_name, model_version
HAVING
  COUNT(*) > 1
  OR LOGICAL_OR(IFNULL(deleted_at = @now, FALSE))
  OR LOGICAL_OR(NOT IFNULL(verified, TRUE))
ORDER BY model_name, model_version
"""


def _one_row_each(columns: Sequence[str]) -> str:
    return f"""
    MERGE {{table}} AS T
    USING (
      SELECT * FROM {{table}}
      WHERE environment = @environment
      QUALIFY 1 = ROW_NUMBER() OVER (
        PARTITION BY model_name, model_version ORDER BY registered_at DESC, verified DESC
      )
    ) AS S
    ON FALSE
    WHEN NOT MATCHED THEN INSERT ({_listed("`{}`", columns)}) VALUES ({_listed("S.`{}`", columns)})
    WHEN NOT MATCHED BY SOURCE AND T.environment = @environment THEN DELETE
    """


_EXAMINED = """
SELECT model_name, model_version, generation, metadata
FROM {table}
WHERE environment = @environment AND verified IS NOT NULL
"""
