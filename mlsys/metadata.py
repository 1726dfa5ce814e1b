"""`metadata.json`: what stands beside a model, written in the notebook and read by the service."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_jsonable_python

from mlsys.errors import InvalidRequest
from mlsys.frame import FrameKind, to_frame
from mlsys.tables import BIGQUERY_TO_ARROW, bigquery_column, standard_type

# Two versions of a library may add up in another order; a model that answers otherwise differs
# by far more.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9

# Of the types that JSON lacks; its floats lack NaN and infinity.
_FROM_JSON: dict[str, Callable[[str], Any]] = {
    "FLOAT64": float,
    "NUMERIC": Decimal,
    "BIGNUMERIC": Decimal,
    "BYTES": base64.urlsafe_b64decode,
    "DATE": date.fromisoformat,
    "TIME": time.fromisoformat,
    "DATETIME": datetime.fromisoformat,
    "TIMESTAMP": datetime.fromisoformat,
}


class FeatureMetadata(BaseModel):
    """A feature and its types."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    type: str | None = Field(None, description="Its BigQuery type, such as INT64 or ARRAY<STRING>")
    dtype: str | None = Field(None, description="Its dtype where the model was trained")


class GoldenRows(BaseModel):
    """A few rows, and what the model answered to them where it was trained."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    rows: list[dict[str, Any]]
    predictions: list[Any]
    probabilities: list[list[float]] | None = None

    @property
    def width(self) -> int:
        """How many columns the model predicts."""
        first = next(iter(self.predictions), None)
        return len(first) if isinstance(first, list) else 1


class ModelMetadata(BaseModel):
    """All of it is optional; what else is in the file is kept."""

    model_config = ConfigDict(
        extra="allow", frozen=True, protected_namespaces=(), ser_json_inf_nan="strings"
    )

    features: list[str | FeatureMetadata] | None = None
    id_columns: list[str] | None = None
    target: str | list[str] | None = None
    frame: Literal["pandas", "polars", "numpy"] | None = None
    classes: list[Any] | None = None
    metrics: dict[str, Any] | None = None
    sklearn_version: str | None = None
    python_version: str | None = None
    trained_at: datetime | None = None
    sha256: str | None = Field(None, description="Of model.pkl, in hexadecimal")
    golden: GoldenRows | None = None

    @property
    def targets(self) -> list[str]:
        """The names of the targets, none where they are not given."""
        return [self.target] if isinstance(self.target, str) else list(self.target or ())

    def typed_features(self) -> list[FeatureMetadata]:
        """The features, those given by name alone without types."""
        return [
            FeatureMetadata(name=each) if isinstance(each, str) else each
            for each in self.features or ()
        ]


def describe_features(rows: pa.Table, dtypes: Sequence[str]) -> list[FeatureMetadata]:
    """The features of rows as `mlsys.frame.to_arrow` gives them."""
    return [
        FeatureMetadata(name=field.name, type=standard_type(bigquery_column(field)), dtype=dtype)
        for field, dtype in zip(rows.schema, dtypes, strict=True)
    ]


def golden_rows(model: Any, rows: pa.Table, frame: FrameKind) -> GoldenRows:
    """What `model` answers to `rows`: seen through the frame that the service will give it.

    Args:
        rows: the features in order, as `mlsys.frame.to_arrow` gives them.

    Raises:
        InvalidRequest: the model answers another number of rows.
        Whatever else the model raises.
    """
    predictions, probabilities = _answers(model, to_frame(rows, frame))
    if wrong := _miscounted(predictions, rows.num_rows):
        raise InvalidRequest(f"The model does not predict rows: {wrong}.")
    return GoldenRows(
        rows=_as_json(rows.to_pylist()),
        predictions=_as_json(predictions.tolist()),
        probabilities=None if probabilities is None else probabilities.tolist(),
    )


def golden_mismatch(model: Any, metadata: ModelMetadata, frame: FrameKind) -> str | None:
    """Asks a model its golden rows again.

    Returns:
        How its answers differ from those it gave where it was trained; None where they agree, or
        where there are no golden rows.
    """
    golden, features = metadata.golden, metadata.typed_features()
    if golden is None or not golden.rows or any(each.type is None for each in features):
        return None
    try:
        rows = _from_json(golden.rows, features)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return "its golden rows in metadata.json can't be read"
    return answers_mismatch(model, golden, to_frame(rows, frame))


def answers_mismatch(model: Any, golden: GoldenRows, rows: Any) -> str | None:
    """How a model's answers to `rows` differ from the golden ones; None where they agree."""
    try:
        predictions, probabilities = _answers(model, rows)
    except BaseException as error:  # A model may raise anything; a panic in Rust is no Exception.
        return f"it raises {type(error).__name__}"
    if told := _miscounted(predictions, len(golden.rows)):
        return told
    if wrong := _count_differing(golden.predictions, predictions):
        return f"{wrong} of {len(golden.rows)} predictions differ"
    if golden.probabilities is None:
        return None
    if probabilities is None:
        return "it gives no probabilities"
    wrong = _count_differing(golden.probabilities, probabilities)
    return f"{wrong} of {len(golden.rows)} probabilities differ" if wrong else None


def _answers(model: Any, frame: Any) -> tuple[np.ndarray, np.ndarray | None]:
    predictions = _dense(model.predict(frame))
    probabilities = model.predict_proba(frame) if hasattr(model, "predict_proba") else None
    # Several targets give a list of arrays; their labels say enough.
    told = probabilities is not None and not isinstance(probabilities, list)
    return predictions, _dense(probabilities) if told else None


def _dense(values: Any) -> np.ndarray:
    return np.atleast_1d(values.toarray() if hasattr(values, "toarray") else np.asarray(values))


def first_mistake(error: ValidationError) -> tuple[str, str]:
    """Where in a metadata.json it is, empty for all of it, and what it is: no value of the file."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"]


def _miscounted(predictions: np.ndarray, rows: int) -> str | None:
    """What is wrong where a model does not give an answer a row.

    A frame gives the names of its columns to whoever goes through it as a list, as vectorizers do.
    """
    if len(predictions) == rows:
        return None
    return (
        f"it gives {len(predictions)} answers for {rows} rows. A model of one column of text has "
        "to be fitted on a frame, with a ColumnTransformer that picks the column, not on a Series"
    )


def _count_differing(expected: list[Any], actual: np.ndarray) -> int:
    if len(actual) != len(expected):
        return len(expected)
    if actual.dtype.kind != "f":
        return sum(a != b for a, b in zip(expected, _as_json(actual.tolist()), strict=True))
    try:
        wanted = np.asarray(expected, dtype=float)
    except ValueError:  # Words, where the model now answers numbers.
        return len(expected)
    if wanted.shape != actual.shape:
        return len(expected)
    same = np.isclose(actual, wanted, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
    return int((~same.reshape(len(same), -1).all(axis=1)).sum())


def _as_json(value: Any) -> Any:
    """Values as JSON has them; what JSON lacks as text, bytes in base64."""
    return to_jsonable_python(
        value, bytes_mode="base64", inf_nan_mode="strings", fallback=without_numpy
    )


def without_numpy(value: Any) -> Any:
    """numpy's numbers and arrays as Python's own, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _from_json(rows: list[dict[str, Any]], features: Sequence[FeatureMetadata]) -> pa.Table:
    return pa.table({f.name: _column([row[f.name] for row in rows], f.type) for f in features})


def _column(values: list[Any], type_name: str) -> pa.Array:
    item = type_name.removeprefix("ARRAY<").removesuffix(">")
    read = _FROM_JSON.get(item, lambda value: value)

    def value(told: Any) -> Any:
        if isinstance(told, list):
            return [value(each) for each in told]
        return None if told is None else read(told)

    kind = BIGQUERY_TO_ARROW[item]
    return pa.array(map(value, values), kind if item == type_name else pa.list_(kind))
