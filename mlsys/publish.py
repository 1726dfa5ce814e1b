"""A model into its environment's bucket, with all that the service needs to trust it."""

from __future__ import annotations

import getpass
import hashlib
import io
import pickle
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FunctionType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
import pyarrow as pa
from gcloud.aio.storage import Storage
from pydantic import ValidationError

from mlsys.blocking import blocking
from mlsys.errors import Conflict, InvalidRequest, redacted
from mlsys.frame import FrameKind, to_arrow
from mlsys.gcs import find_blob, list_blobs, write_blob
from mlsys.metadata import (
    GoldenRows,
    ModelMetadata,
    answers_mismatch,
    describe_features,
    first_mistake,
    golden_rows,
    without_numpy,
)
from mlsys.names import (
    LONGEST_COLUMN_NAME,
    METADATA_FILE,
    MODEL_FILE,
    PREDICTION,
    TOLD_NAMES,
    Environment,
    artifact_path,
    check_model_name,
    is_column_name,
    is_version_to_write,
    parse_artifact_path,
    shown,
    version_number,
)
from mlsys.progress import wait_bar
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
        rows: a few rows of what the model was trained on, the features at least: of a model that
            does not know their names those alone, unless `metadata` names them. They give the
            features' types; the first five, and the model's answers to them, go along as golden
            rows, which the service asks the model again when it loads it. Without them the
            metadata names the features alone, and nothing is asked again.
        target: the name of the prediction, or of each where there are several.
        id_columns: what the output table carries where the caller does not say.
        metrics: how good the model is.
        metadata: whatever else shall stand in metadata.json; `trained_at`, if that was not now.
        env: whose bucket.

    Raises:
        InvalidRequest: a name is malformed, or what shall stand in metadata.json; the model is not
            fitted, does not predict these rows, or can't be pickled for others: it needs a class
            or function that only the notebook defines.
        Conflict: that version exists.
        NotFound, AccessDenied, Unavailable: the bucket, as the names say.
    """
    if not isinstance(name, str):
        raise InvalidRequest(
            f"name is a {type(name).__name__}. Pass the model first, and then its name."
        )
    check_model_name(name)
    if version != NEXT and not is_version_to_write(version):
        raise InvalidRequest(
            f"{shown(str(version))} is no version to write. Use v1, v2, … or next."
        )
    if env not in set(Environment):
        raise InvalidRequest(f"env is {shown(str(env))}. Use one of {', '.join(Environment)}.")
    _check_predicts(model)
    data = _pickled(model)
    features = _feature_names(model, metadata)
    facts = _known(model) | ({} if rows is None else _seen(model, rows, features))
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    told, text = _told(metadata, facts, target=target, id_columns=id_columns, metrics=metrics)
    _check_columns(told)
    with wait_bar("publishing"), blocking(settings) as (loop, clients, chosen):
        bucket = chosen.model_bucket(Environment(env))
        return loop.call(_publish, clients.objects, bucket, name, version, data, text, told)


def _check_predicts(model: Any) -> None:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    if isinstance(model, type) or not callable(getattr(model, "predict", None)):
        raise InvalidRequest(
            f"The model is a {type(model).__name__}, which can't predict. Pass a fitted "
            "scikit-learn estimator or pipeline, not its class."
        )
    # Both, as some predict that check_is_fitted refuses: a threshold put upon a fitted classifier,
    # or whoever keeps what it learns under names of its own.
    checks = (check_is_fitted, model), (model.predict, np.zeros((1, 1)))
    if all(isinstance(_raised(*check), NotFittedError) for check in checks):
        raise InvalidRequest(f"The {type(model).__name__} is not fitted. Call its `fit` first.")


def _raised(ask: Callable[[Any], Any], about: Any) -> Exception | None:
    try:
        ask(about)
    except Exception as error:  # A model may raise anything at all.
        return error
    return None


def _told(
    metadata: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    *,
    target: str | Sequence[str] | None,
    id_columns: str | Sequence[str] | None,
    metrics: Mapping[str, float] | None,
) -> tuple[ModelMetadata, bytes]:
    """All that is known of a model, and what else is told of it; and that as metadata.json."""
    try:
        known = dict(facts) | {
            "target": target if target is None or isinstance(target, str) else list(target),
            "id_columns": _names(id_columns),
            "metrics": None if metrics is None else {k: float(v) for k, v in dict(metrics).items()},
        }
        known = {name: fact for name, fact in known.items() if fact is not None}
        now = {"trained_at": datetime.now(UTC)}
        told = ModelMetadata.model_validate(now | dict(metadata or {}) | known)
        text = told.model_dump_json(indent=2, exclude_none=True, fallback=without_numpy)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"metadata.json can't be written: {_said(error)}. Pass numbers as metrics, names as "
            "target and id_columns, and by name whatever else metadata shall hold."
        ) from error
    return told, text.encode()


def _said(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return redacted(str(error))
    return ": ".join(first_mistake(error))


def _names(names: str | Sequence[str] | None) -> list[str] | None:
    if names is None or isinstance(names, str):
        return None if names is None else [names]
    return list(names)


def _check_columns(told: ModelMetadata) -> None:
    """Checks what becomes of the output table, which the service would refuse in every run."""
    for place, names in (("target", told.targets), ("id_columns", told.id_columns or [])):
        if wrong := [shown(name) for name in names if not is_column_name(name)]:
            raise InvalidRequest(
                f"{place}: BigQuery has no column of the name {', '.join(wrong)}. Use letters, "
                f"digits and underscores, at most {LONGEST_COLUMN_NAME}."
            )
        if len({name.casefold() for name in names}) < len(names):
            raise InvalidRequest(f"{place} names a column more than once: {', '.join(names)}.")
    golden, targets = told.golden, len(told.targets)
    # One name will do for all: the service numbers the columns.
    numbered = targets == 1 and golden is not None and golden.width > 1
    names = [*(told.id_columns or ()), *(() if numbered else told.targets or [PREDICTION])]
    count = Counter(name.casefold() for name in (*names, *TOLD_NAMES))
    if clashing := dict.fromkeys(name for name in names if count[name.casefold()] > 1):
        raise InvalidRequest(
            f"The output table would have several columns of one name: {', '.join(clashing)}. "
            "Leave them out of id_columns, or name another target."
        )
    if golden is not None and targets > 1 and targets != golden.width:
        raise InvalidRequest(
            f"target has {targets} names, but the model predicts {golden.width} columns. Name each "
            "of them, or give one name for all."
        )


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


def _feature_names(model: Any, metadata: Mapping[str, Any] | None) -> list[str] | None:
    """As the model knows them, else as the caller says; None: every column of its rows is one."""
    fitted = getattr(model, "feature_names_in_", None)
    told = (metadata or {}).get("features") if fitted is None else fitted
    if told is None or isinstance(told, str):
        return None
    names = [each.get("name") if isinstance(each, Mapping) else each for each in told]
    # What is no name is told with the rest of the metadata.
    return names if all(isinstance(name, str) for name in names) else None


def _seen(model: Any, rows: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """What rows of its features tell of a model."""
    fitted = getattr(model, "feature_names_in_", None)
    features = _feature_rows(rows, names)
    width = getattr(model, "n_features_in_", features.num_columns)
    if fitted is None and features.num_columns != width:
        raise InvalidRequest(
            f"rows has {features.num_columns} columns, and the model was fitted on {width} without "
            "names. Pass those alone, in their order, or name them in the metadata's `features`."
        )
    frame, golden = _golden(model, features.slice(0, _GOLDEN_ROWS), _frame_kinds(rows, fitted))
    if frame is FrameKind.NUMPY:
        _check_answers(model, golden, rows, features.column_names)
    return {
        "features": describe_features(features, _dtypes(rows, features.column_names)),
        "frame": str(frame),
        "golden": golden,
    }


def _check_answers(model: Any, golden: GoldenRows, rows: Any, names: Sequence[str]) -> None:
    """Raises InvalidRequest where the model answers an array of the caller's rows otherwise."""
    if isinstance(rows, pa.Table):
        return
    as_given = rows[list(names)].head(_GOLDEN_ROWS).to_numpy()
    if _raised(model.predict, as_given) is not None:
        return  # It was fitted on another array, such as one of another dtype.
    if differs := answers_mismatch(model, golden, as_given):
        raise InvalidRequest(
            "The model answers an array of these rows otherwise than what the service would make "
            f"of them: {differs}. Fit it on the array of a pandas frame from bq_get, where a "
            "missing word is NaN, or on a frame."
        )


def _golden(model: Any, rows: pa.Table, kinds: Sequence[FrameKind]) -> tuple[FrameKind, GoldenRows]:
    """The first kind of frame that a model predicts on, and its answers."""
    for kind in kinds:
        try:
            return kind, golden_rows(model, rows, kind)
        except Exception as error:  # A model may raise anything at all.
            last = error
    if isinstance(last, InvalidRequest):
        raise last
    raise InvalidRequest(
        "The model does not predict these rows as the service would give them to it: "
        f"{type(last).__name__}: {redacted(str(last))}. Train it on what bq_get returns."
    ) from last


def _feature_rows(rows: Any, fitted: Sequence[str] | None) -> pa.Table:
    # Nothing is asked of other columns, such as that BigQuery could hold them.
    table = to_arrow(rows if fitted is None else _selected(rows, list(fitted)))
    if not table.num_rows:
        raise InvalidRequest("rows is empty. Pass a few rows that the model was trained on.")
    return table


def _selected(rows: Any, names: list[str]) -> Any:
    there = rows.column_names if isinstance(rows, pa.Table) else getattr(rows, "columns", None)
    if there is None:
        return rows  # No frame, which `to_arrow` tells.
    if missing := [name for name in names if name not in there]:
        raise InvalidRequest(f"rows lacks features of the model: {', '.join(missing)}.")
    if not isinstance(rows, pa.Table):
        return rows[names]
    # By position, as names may be repeated.
    return rows.select([i for name in names for i, each in enumerate(there) if each == name])


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
