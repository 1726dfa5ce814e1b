"""A model into its environment's bucket, with all that the service needs to trust it."""

from __future__ import annotations

import getpass
import hashlib
import io
import pickle
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FunctionType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
import pyarrow as pa
from gcloud.aio.storage import Storage

from mlsys.blocking import blocking
from mlsys.errors import Conflict, InvalidRequest, redacted
from mlsys.frame import FrameKind, to_arrow
from mlsys.gcs import find_blob, list_blobs, write_blob
from mlsys.metadata import (
    GoldenRows,
    ModelMetadata,
    describe_features,
    golden_rows,
    without_numpy,
)
from mlsys.names import (
    LATEST,
    METADATA_FILE,
    MODEL_FILE,
    Environment,
    artifact_path,
    check_model_name,
    check_version,
    parse_artifact_path,
    shown,
    version_number,
)
from mlsys.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

NEXT = "next"
_GOLDEN_ROWS = 5
_MOST_TRIES = 100


@dataclass(frozen=True)
class PublishedModel:
    """Where a model went."""

    name: str
    version: str
    uri: str
    generation: int
    metadata: ModelMetadata


def publish_model(
    model: Any,
    name: str,
    version: str = NEXT,
    *,
    rows: pd.DataFrame | pl.DataFrame | pa.Table | None = None,
    target: str | Sequence[str] | None = None,
    id_columns: str | Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    env: str = "dev",
    settings: Settings | None = None,
) -> PublishedModel:
    """Uploads a fitted model and a complete metadata.json; a version is never written twice.

    Args:
        model: any fitted scikit-learn estimator or pipeline.
        name: lower case words joined by hyphens.
        version: `v1`, `v2`, … or `next`, the one after the highest there is.
        rows: a few rows of what the model was trained on, the features at least. They give the
            features' types; the first five, and the model's answers to them, go along as golden
            rows, which the service asks the model again when it loads it. Without them the
            metadata names the features alone, and nothing is asked again.
        target: the name of the prediction, or of each where there are several.
        id_columns: what the output table carries where the caller does not say.
        metrics: how good the model is.
        metadata: whatever else shall stand in metadata.json; `trained_at`, if that was not now.
        env: whose bucket.

    Raises:
        InvalidRequest: a name is malformed, the model does not predict these rows, or it can't be
            pickled for others: it needs a class or function that only the notebook defines.
        Conflict: that version exists.
        NotFound, AccessDenied, Unavailable: the bucket, as the names say.
    """
    check_model_name(name)
    if version != NEXT and check_version(version) == LATEST:
        raise InvalidRequest(f"{shown(version)} is no version to write. Use v1, v2, … or next.")
    if env not in set(Environment):
        raise InvalidRequest(f"env is {shown(str(env))}. Use one of {', '.join(Environment)}.")
    data = _pickled(model)
    facts = (
        _known(model)
        | ({} if rows is None else _seen(model, rows))
        | {
            "target": target if target is None or isinstance(target, str) else list(target),
            "id_columns": _names(id_columns),
            "metrics": None if metrics is None else {k: float(v) for k, v in metrics.items()},
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    now = {"trained_at": datetime.now(UTC)}
    known = {name: fact for name, fact in facts.items() if fact is not None}
    told = ModelMetadata.model_validate(now | dict(metadata or {}) | known)
    text = told.model_dump_json(indent=2, exclude_none=True, fallback=without_numpy).encode()
    with blocking(settings) as (loop, clients, chosen):
        bucket = chosen.model_bucket(Environment(env))
        return loop.call(_publish, clients.objects, bucket, name, version, data, text, told)


def _names(names: str | Sequence[str] | None) -> list[str] | None:
    if names is None or isinstance(names, str):
        return None if names is None else [names]
    return list(names)


class _Pickler(pickle.Pickler):
    """Refuses what no other process could load: a pickle holds classes and functions by name."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__":
            raise InvalidRequest(
                f"The model needs {obj.__qualname__}, which only this notebook or script defines, "
                "so the service could not load it. Use what scikit-learn and numpy bring, or move "
                "it to a package that the service installs."
            )
        return NotImplemented


def _pickled(model: Any) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file).dump(model)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"The model can't be pickled: {redacted(str(error))}.") from error
    return file.getvalue()


def _known(model: Any) -> dict[str, Any]:
    """What a model by itself tells of it."""
    import sklearn

    fitted = getattr(model, "feature_names_in_", None)
    return {
        "features": None if fitted is None else [str(name) for name in fitted],
        "classes": _classes(model),
        "sklearn_version": sklearn.__version__,
        "python_version": platform.python_version(),
    }


def _seen(model: Any, rows: Any) -> dict[str, Any]:
    """What rows of its features tell of a model."""
    fitted = getattr(model, "feature_names_in_", None)
    features = _feature_rows(rows, fitted)
    frame, golden = _golden(model, features.slice(0, _GOLDEN_ROWS), _frame_kinds(rows, fitted))
    return {
        "features": describe_features(features, _dtypes(rows, features.column_names)),
        "frame": str(frame),
        "golden": golden,
    }


def _golden(model: Any, rows: pa.Table, kinds: Sequence[FrameKind]) -> tuple[FrameKind, GoldenRows]:
    """The first kind of frame that a model predicts on, and its answers."""
    for kind in kinds:
        try:
            return kind, golden_rows(model, rows, kind)
        except Exception as error:  # A model may raise anything at all.
            last = error
    raise InvalidRequest(
        "The model does not predict these rows as the service would give them to it: "
        f"{type(last).__name__}: {redacted(str(last))}. Train it on what bq_get returns."
    ) from last


def _feature_rows(rows: Any, fitted: Sequence[str] | None) -> pa.Table:
    table = to_arrow(rows)
    if not table.num_rows:
        raise InvalidRequest("rows is empty. Pass a few rows that the model was trained on.")
    if fitted is None:
        return table
    if missing := [name for name in fitted if name not in table.column_names]:
        raise InvalidRequest(f"rows lacks features of the model: {', '.join(missing)}.")
    return table.select(list(fitted))


def _frame_kinds(rows: Any, fitted: Sequence[str] | None) -> list[FrameKind]:
    polars = type(rows).__module__.startswith("polars")
    kind = FrameKind.POLARS if polars else FrameKind.PANDAS
    # One without names was fitted on bare arrays, or has a first step that keeps them to itself.
    return [FrameKind.NUMPY, kind] if fitted is None else [kind]


def _dtypes(rows: Any, names: Sequence[str]) -> list[str]:
    if isinstance(rows, pa.Table):
        return [str(rows.schema.field(name).type) for name in names]
    return [str(rows[name].dtype) for name in names]


def _classes(model: Any) -> list[Any] | None:
    classes = getattr(model, "classes_", None)
    # Several targets have a list of arrays.
    return None if classes is None else [np.asarray(each).tolist() for each in classes]


async def _publish(
    objects: Storage,
    bucket: str,
    name: str,
    version: str,
    data: bytes,
    text: bytes,
    metadata: ModelMetadata,
) -> PublishedModel:
    if version != NEXT:
        await _check_free(objects, bucket, name, version)
        return await _write(objects, bucket, name, version, data, text, metadata)
    number = await _highest(objects, bucket, name)
    for tried in range(number + 1, number + 1 + _MOST_TRIES):
        try:
            return await _write(objects, bucket, name, f"v{tried}", data, text, metadata)
        except Conflict:
            continue  # Somebody else has published meanwhile.
    raise Conflict(f"Somebody keeps publishing {name}. Try again.")


async def _check_free(objects: Storage, bucket: str, name: str, version: str) -> None:
    # The model too: one that was uploaded by hand has no metadata, and shall not get another's.
    for file in (MODEL_FILE, METADATA_FILE):
        path = artifact_path(name, version, file)
        if await find_blob(objects, bucket, path) is not None:
            raise Conflict(
                f"gs://{bucket}/{path} exists, and a version is never written twice. Publish it as "
                "`next`, or as another version."
            )


async def _highest(objects: Storage, bucket: str, name: str) -> int:
    parsed = [
        parse_artifact_path(blob.path) async for blob in list_blobs(objects, bucket, f"{name}/v")
    ]
    return max((version_number(each[1]) for each in parsed if each), default=0)


async def _write(
    objects: Storage,
    bucket: str,
    name: str,
    version: str,
    data: bytes,
    text: bytes,
    metadata: ModelMetadata,
) -> PublishedModel:
    uploader = await anyio.to_thread.run_sync(_uploader)
    # The metadata first: it claims the version, and the model is never there without it.
    await write_blob(
        objects,
        bucket,
        artifact_path(name, version, METADATA_FILE),
        text,
        "application/json",
        if_generation=0,
    )
    path = artifact_path(name, version)
    blob = await write_blob(objects, bucket, path, data, if_generation=0, labels=uploader)
    return PublishedModel(name, version, f"gs://{bucket}/{path}", blob.generation, metadata)


def _uploader() -> dict[str, str]:
    """Who publishes, for the registry: uniform buckets do not keep an object's owner."""
    try:
        return {"uploader": getpass.getuser()}
    except (KeyError, OSError):  # A container may run as a number that has no name.
        return {}
