"""Arrow to pandas, polars and numpy, and back: the only conversion in the project.

`bq_get` and the service both come through here, so that a model sees in production what it saw in
the notebook. The dtype of a column follows from its BigQuery type alone, never from the rows that
happen to be in a chunk:

    BigQuery            pandas                numpy (models fitted on bare arrays)
    INT64               Int64                 float64
    FLOAT64             float64               float64
    NUMERIC, BIGNUMERIC object (Decimal)      float64
    BOOL                boolean               float64 (0.0, 1.0)
    STRING              str                   object
    BYTES, TIME         object                object
    DATE                object (date)         object
    DATETIME            datetime64[us]        object
    TIMESTAMP           datetime64[us, UTC]   object
    ARRAY               object (numpy array)  object

A pandas array of TIMESTAMP is one of objects (datetime), as numpy's own times have no zone.

In polars a column has the type of the same name, but a BIGNUMERIC is Float64: polars has no decimal
that wide.

A null is pandas' own missing value of the dtype (NA, NaN, NaT, None), polars' null, and NaN in an
array of numbers. An array is of float64 where every column is a number or a boolean, and of objects
where one is not: those that `to_numpy` of the pandas frame gives, where a missing word is NaN. For
NA, which scikit-learn does not take in arrays, there is NaN as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa

from mlsys.errors import InvalidRequest
from mlsys.names import LONGEST_COLUMN_NAME, is_column_name, shown

if TYPE_CHECKING:
    from typing import Literal

    import pandas as pd
    import polars as pl

    type Frame = pd.DataFrame | pl.DataFrame | np.ndarray

_NUMERIC, _BIGNUMERIC = pa.decimal128(38, 9), pa.decimal256(76, 38)
_TIMESTAMPS = pa.list_(pa.timestamp("us", "UTC"))
_WIDER = {_NUMERIC: _BIGNUMERIC, pa.list_(_NUMERIC): pa.list_(_BIGNUMERIC)}


class FrameKind(StrEnum):
    """What a model was fitted on, and is given to predict on."""

    PANDAS = "pandas"
    POLARS = "polars"
    NUMPY = "numpy"


@overload
def to_frame(table: pa.Table, kind: Literal[FrameKind.PANDAS]) -> pd.DataFrame: ...
@overload
def to_frame(table: pa.Table, kind: Literal[FrameKind.POLARS]) -> pl.DataFrame: ...
@overload
def to_frame(table: pa.Table, kind: Literal[FrameKind.NUMPY]) -> np.ndarray: ...
@overload
def to_frame(table: pa.Table, kind: FrameKind) -> Frame: ...
def to_frame(table: pa.Table, kind: FrameKind) -> Frame:
    """Converts a table of n rows and k columns.

    Returns:
        A frame with the table's columns in their order, or an array of shape (n, k).
    """
    match kind:
        case FrameKind.PANDAS:
            return _to_pandas(table)
        case FrameKind.POLARS:
            return _to_polars(table)
        case FrameKind.NUMPY:
            return _to_numpy(table)


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    import pandas as pd

    # Without a mapper a chunk without nulls would get int64, and one with nulls float64.
    dtypes = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = table.to_pandas(types_mapper=dtypes.get, use_threads=False)
    for position, kind in enumerate(table.schema.types):
        if kind == _TIMESTAMPS:  # numpy's own times, which Arrow makes of them, have no zone.
            frame.isetitem(position, _objects(table.column(position)))
    return frame


def _objects(lists: pa.ChunkedArray) -> pd.Series:
    import pandas as pd

    arrays = (None if each is None else np.array(each, object) for each in lists.to_pylist())
    return pd.Series(arrays, dtype=object)


def _to_polars(table: pa.Table) -> pl.DataFrame:
    import polars as pl

    fields = [field.with_type(_in_polars(field.type)) for field in table.schema]
    return pl.from_arrow(table.cast(pa.schema(fields)))


def _in_polars(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_in_polars(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_in_polars(field.type)) for field in kind])
    # Given a decimal of 256 bits, polars panics.
    return pa.float64() if pa.types.is_decimal256(kind) else kind


def _to_numpy(table: pa.Table) -> np.ndarray:
    if all(is_numeric(kind) for kind in table.schema.types):
        return _numbers(table, row_major=True)
    frame = _to_pandas(table)
    array = np.empty(frame.shape, object)
    for position, dtype in enumerate(frame.dtypes):
        missing = {"na_value": np.nan} if str(dtype) in ("Int64", "boolean") else {}
        array[:, position] = frame.iloc[:, position].to_numpy(dtype=object, **missing)
    return array


def by_columns(table: pa.Table) -> np.ndarray:
    """A table of numbers and booleans as an array of float64, each column in one piece.

    The layout is that of the array in a pandas frame; a null is NaN.

    Returns:
        An array of shape (n, k), in Fortran's order.
    """
    return _numbers(table, row_major=False)


def _numbers(table: pa.Table, *, row_major: bool) -> np.ndarray:
    for position, field in enumerate(table.schema):
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
            column = _as_floats(table.column(position))
            table = table.set_column(position, field.name, column)
    # One call for all columns, which lets other threads have Python's lock.
    array = table.to_tensor(null_to_nan=True, row_major=row_major).to_numpy()
    return array.astype(np.float64, copy=False)


def _as_floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_decimal(column.type):
        # By itself Arrow is an ulp off: 0.03 comes to 0.030000000000000002.
        column = column.cast(pa.string())
    return column.cast(pa.float64(), safe=False)


def is_numeric(kind: pa.DataType) -> bool:
    """Whether a column of this type can stand in an array of floats."""
    types = pa.types
    return (
        types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or types.is_boolean(kind)
    )


def to_arrow(frame: Frame | pa.Table | pa.RecordBatch) -> pa.Table:
    """Converts a frame to a table that BigQuery can take, each column in BigQuery's own type.

    Small integers and floats are widened, categories spelled out, timestamps brought to
    microseconds (in UTC where they have a zone), and a null list becomes an empty one: BigQuery
    has no other. A decimal is NUMERIC where all its values fit, else BIGNUMERIC. A pandas index is
    left behind.

    Raises:
        InvalidRequest: it is no frame, or BigQuery lacks a column's name, type or values; the
            column is named.
    """
    table = _as_table(frame)
    _check_names(table.column_names)
    columns = {
        name: _storable(name, column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return pa.table(columns)


def _as_table(frame: Frame | pa.Table | pa.RecordBatch) -> pa.Table:
    import pandas as pd
    import polars as pl

    match frame:
        case pa.Table():
            return frame
        case pa.RecordBatch():
            return pa.Table.from_batches([frame])
        case pl.DataFrame():
            return _from_polars(frame)
        case pd.DataFrame():
            return _from_pandas(frame)
    raise InvalidRequest(
        f"A {type(frame).__name__} is no frame. Pass a DataFrame of pandas or polars, or an Arrow "
        "table."
    )


def _check_names(names: Sequence[Hashable]) -> None:
    if not names:
        raise InvalidRequest("The frame has no columns.")
    for name in names:
        if not isinstance(name, str):
            raise InvalidRequest(f"Column {name!r}: a column's name has to be a string.")
        if not is_column_name(name):
            raise InvalidRequest(
                f"Column {shown(name)}: BigQuery has no column of this name. Use letters, digits "
                f"and underscores, at most {LONGEST_COLUMN_NAME}."
            )
    count = Counter(name.casefold() for name in names)
    if repeated := [name for name in names if count[name.casefold()] > 1]:
        raise InvalidRequest(
            f"The columns {', '.join(repeated)} have one name for BigQuery, which ignores case. "
            "Rename them."
        )


def _from_polars(frame: pl.DataFrame) -> pa.Table:
    import polars as pl

    columns = {}
    for name, dtype in frame.schema.items():
        try:
            # As Arrow, Python objects would be so many bytes: their addresses.
            columns[name] = None if dtype == pl.Object else frame[name].to_arrow()
        except pa.ArrowInvalid:
            columns[name] = None
        if columns[name] is None:
            raise InvalidRequest(f"Column {name!r}: BigQuery has no column of type {dtype}.")
    return pa.table(columns)


def _from_pandas(frame: pd.DataFrame) -> pa.Table:
    _check_names(list(frame.columns))
    return pa.table({name: _from_series(name, frame[name]) for name in frame.columns})


def _from_series(name: str, values: pd.Series) -> pa.Array | pa.ChunkedArray:
    try:
        array = pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise _unstorable(name, values) from error
    if values.dtype == object and _mixes(values, array.type):
        raise _unstorable(name, values)
    return array


def _unstorable(name: str, values: pd.Series) -> InvalidRequest:
    return InvalidRequest(
        f"Column {name!r} ({values.dtype}): BigQuery can't store its values in one column. Give "
        "them one type, with astype(), and round times to microseconds."
    )


def _mixes(values: pd.Series, kind: pa.DataType) -> bool:
    """Whether Arrow has cut a part of a time, forgotten a zone, or taken a string for bytes."""
    in_lists = pa.types.is_list(kind)
    item = kind.value_type if in_lists else kind
    if not (pa.types.is_temporal(item) or pa.types.is_binary(item)):
        return False
    each = values.dropna()
    if in_lists:
        each = [value for array in each for value in array if value is not None]
    kinds = {
        (
            isinstance(value, str),
            isinstance(value, datetime),
            getattr(value, "tzinfo", None) is None,
        )
        for value in each
    }
    return len(kinds) > 1 or any(getattr(value, "nanosecond", 0) for value in each)


def _storable(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = _storable_type(column.type)
    if kind is None:
        raise InvalidRequest(
            f"Column {name!r}: no column of BigQuery is made of {column.type} here. Convert it, to "
            "numbers or text for example."
        )
    try:
        column = _cast(column, kind)
    except pa.ArrowInvalid as error:
        raise InvalidRequest(
            f"Column {name!r}: its values don't fit BigQuery's {kind} without a loss. Round or "
            "convert them first."
        ) from error
    return _without_nulls(name, column) if pa.types.is_list(kind) else column


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        if kind not in _WIDER:
            raise
        return column.cast(_WIDER[kind])


def _storable_type(kind: pa.DataType) -> pa.DataType | None:
    """The type that BigQuery keeps such values in; None where it has none."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _storable_type(kind.value_type)
        return None if item is None or types.is_list(item) else pa.list_(item)
    if types.is_dictionary(kind):
        return _storable_type(kind.value_type)
    if types.is_decimal(kind):
        return _NUMERIC if kind.scale <= _NUMERIC.scale else _BIGNUMERIC
    if types.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz else None)
    plain = (
        (types.is_boolean, pa.bool_()),
        (types.is_integer, pa.int64()),
        (types.is_floating, pa.float64()),
        (types.is_null, pa.string()),
        (types.is_date, pa.date32()),
        (types.is_time, pa.time64("us")),
        (lambda t: t in (pa.string(), pa.large_string(), pa.string_view()), pa.string()),
        (types.is_binary, pa.binary()),
        (types.is_large_binary, pa.binary()),
        (types.is_binary_view, pa.binary()),
        (types.is_fixed_size_binary, pa.binary()),
    )
    return next((ours for fits, ours in plain if fits(kind)), None)


def _without_nulls(name: str, lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Null lists as empty ones, and null numbers in them as NaN."""
    nulls = sum(chunk.flatten().null_count for chunk in lists.chunks)
    if nulls and not pa.types.is_floating(lists.type.value_type):
        raise InvalidRequest(f"Column {name!r}: an array in BigQuery has no nulls. Leave them out.")
    if not nulls and not lists.null_count:
        return lists
    nan = float("nan")
    filled = [[nan if v is None else v for v in each or ()] for each in lists.to_pylist()]
    return pa.chunked_array([filled], lists.type)
