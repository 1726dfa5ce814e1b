"""What a column becomes: its dtype follows from its type, whatever rows are there."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from mlsys import frame
from mlsys.frame import FrameKind, is_numeric, to_frame
from mlsys.tables import BIGQUERY_TO_ARROW

UTC = ZoneInfo("UTC")


@dataclass(frozen=True)
class Column:
    """A BigQuery type: some of its values, and what each kind of frame makes of it."""

    values: list[Any]
    pandas: str
    polars: pl.DataType
    numpy: str = "object"
    missing: Any = None
    widened: list[float] | None = None


COLUMNS = {
    "INT64": Column(
        [2**53 + 1, -(2**63), 2**63 - 1],
        "Int64",
        pl.Int64(),
        "float64",
        pd.NA,
        [float(2**53), -(2.0**63), 2.0**63],
    ),
    "FLOAT64": Column([0.1, -1e300, float("inf")], "float64", pl.Float64(), "float64", np.nan),
    "NUMERIC": Column(
        [Decimal("1.500000000"), Decimal("-99999999999999999999999999999.999999999")],
        "object",
        pl.Decimal(38, 9),
        "float64",
        None,
        [1.5, -1e29],
    ),
    "BIGNUMERIC": Column(
        [Decimal(f"1.5{'0' * 37}"), Decimal(f"1{'0' * 37}.{'0' * 37}1")],
        "object",
        pl.Float64(),
        "float64",
        None,
        [1.5, 1e37],
    ),
    "BOOL": Column([True, False], "boolean", pl.Boolean(), "float64", pd.NA, [1.0, 0.0]),
    "STRING": Column(["", "Ørsted", "a\x00b"], "str", pl.String(), missing=np.nan),
    "BYTES": Column([b"", b"\xff\x00"], "object", pl.Binary()),
    "TIME": Column([dt.time(), dt.time(23, 59, 59, 999999)], "object", pl.Time()),
    "DATE": Column([dt.date(1, 1, 1), dt.date(9999, 12, 31)], "object", pl.Date()),
    "DATETIME": Column(
        [dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59, 999999)],
        "datetime64[us]",
        pl.Datetime("us"),
        missing=pd.NaT,
    ),
    "TIMESTAMP": Column(
        [
            dt.datetime(1, 1, 1, tzinfo=UTC),
            dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        ],
        "datetime64[us, UTC]",
        pl.Datetime("us", "UTC"),
        missing=pd.NaT,
    ),
}
TYPES = pytest.mark.parametrize("name", COLUMNS)
KINDS = pytest.mark.parametrize("kind", FrameKind)


def rows_of(name: str) -> dict[str, list[Any]]:
    """The rows that a chunk may happen to have."""
    values = COLUMNS[name].values
    return {
        "no null": values,
        "some nulls": [*values, None, *values],
        "nulls only": [None, None],
        "one row": values[:1],
        "no row": [],
    }


ROWS = pytest.mark.parametrize("rows", ["no null", "some nulls", "nulls only", "one row", "no row"])


def table_of(name: str, values: list[Any]) -> pa.Table:
    return pa.table({"x": pa.array(values, BIGQUERY_TO_ARROW[name])})


def same(left: Any, right: Any) -> bool:
    """Equal, or the same missing value."""
    if left is None or right is None or left is pd.NA or right is pd.NA:
        return left is right
    if left is pd.NaT or right is pd.NaT:
        return left is right
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (np.isnan(left) and np.isnan(right))
    return type(left) is type(right) and left == right


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for left, right in zip(actual, expected, strict=True):
        assert same(left, right), (left, right)


def test_every_type_that_a_table_can_have_is_looked_at() -> None:
    assert set(COLUMNS) == set(BIGQUERY_TO_ARROW)


@TYPES
@ROWS
def test_the_dtype_in_pandas_depends_on_the_type_and_never_on_the_rows(
    name: str, rows: str
) -> None:
    data = to_frame(table_of(name, rows_of(name)[rows]), FrameKind.PANDAS)

    assert str(data["x"].dtype) == COLUMNS[name].pandas


@TYPES
@ROWS
def test_pandas_has_every_value_and_a_missing_value_for_every_null(name: str, rows: str) -> None:
    column, values = COLUMNS[name], rows_of(name)[rows]

    data = to_frame(table_of(name, values), FrameKind.PANDAS)

    stamp = pd.Timestamp if column.pandas.startswith("datetime64") else lambda value: value
    expected = [column.missing if value is None else stamp(value) for value in values]
    assert_same(data["x"].tolist(), expected)


@TYPES
@ROWS
def test_the_dtype_in_polars_depends_on_the_type_and_never_on_the_rows(
    name: str, rows: str
) -> None:
    data = to_frame(table_of(name, rows_of(name)[rows]), FrameKind.POLARS)

    assert data.schema == {"x": COLUMNS[name].polars}


@TYPES
@ROWS
def test_polars_has_every_value_and_a_null_for_every_null(name: str, rows: str) -> None:
    values = rows_of(name)[rows]

    data = to_frame(table_of(name, values), FrameKind.POLARS)

    as_polars_has_it = float if name == "BIGNUMERIC" else lambda value: value
    expected = [None if value is None else as_polars_has_it(value) for value in values]
    assert_same(data["x"].to_list(), expected)


@TYPES
@ROWS
def test_the_dtype_of_an_array_depends_on_the_type_and_never_on_the_rows(
    name: str, rows: str
) -> None:
    values = rows_of(name)[rows]

    array = to_frame(table_of(name, values), FrameKind.NUMPY)

    assert array.dtype == COLUMNS[name].numpy
    assert array.shape == (len(values), 1)


@TYPES
@ROWS
def test_an_array_has_every_value_and_what_pandas_has_for_every_null(name: str, rows: str) -> None:
    column, values = COLUMNS[name], rows_of(name)[rows]
    numbers = dict(zip(map(str, column.values), column.widened or column.values, strict=True))
    stamp = pd.Timestamp if column.pandas.startswith("datetime64") else lambda value: value

    array = to_frame(table_of(name, values), FrameKind.NUMPY)

    missing = np.nan if column.numpy == "float64" else column.missing
    expected = [missing if value is None else stamp(numbers[str(value)]) for value in values]
    assert_same(array[:, 0].tolist(), expected)


ITEMS = pytest.mark.parametrize("item", COLUMNS)


def lists_of(item: str) -> list[list[Any]]:
    values = COLUMNS[item].values
    # Two of the same length: numpy would take those for a matrix.
    return [values[:2], values[1::-1], [], values[:1]]


@ITEMS
@pytest.mark.parametrize("rows", [4, 2, 0])
def test_an_array_column_is_one_of_objects_whatever_the_lengths(item: str, rows: int) -> None:
    lists = lists_of(item)[:rows]
    table = pa.table({"x": pa.array(lists, pa.list_(BIGQUERY_TO_ARROW[item]))})

    data = to_frame(table, FrameKind.PANDAS)
    array = to_frame(table, FrameKind.NUMPY)

    assert data["x"].dtype == object
    assert all(isinstance(each, np.ndarray) and each.ndim == 1 for each in data["x"])
    assert array.dtype == object
    assert array.shape == (rows, 1)
    assert [list(each) for each in array[:, 0]] == lists


@ITEMS
def test_an_array_column_is_a_list_of_the_items_type_in_polars(item: str) -> None:
    for lists in (lists_of(item), []):
        table = pa.table({"x": pa.array(lists, pa.list_(BIGQUERY_TO_ARROW[item]))})

        data = to_frame(table, FrameKind.POLARS)

        assert data.schema == {"x": pl.List(COLUMNS[item].polars)}
        convert = float if item == "BIGNUMERIC" else lambda value: value
        assert data["x"].to_list() == [[convert(value) for value in each] for each in lists]


def test_a_wide_decimal_in_a_struct_is_a_float_in_polars() -> None:
    kind = pa.struct(
        [
            ("price", BIGQUERY_TO_ARROW["BIGNUMERIC"]),
            ("prices", pa.list_(BIGQUERY_TO_ARROW["BIGNUMERIC"])),
        ]
    )
    rows = [{"price": Decimal("1.5"), "prices": [Decimal(2)]}, None]

    data = to_frame(pa.table({"x": pa.array(rows, kind)}), FrameKind.POLARS)

    assert data["x"].to_list() == [{"price": 1.5, "prices": [2.0]}, None]


def wide_table() -> pa.Table:
    """A column of each type and a list, with nulls in the second half only."""
    rows = 6
    columns = {
        name: pa.array(
            [column.values[i % 2] if i < 3 or i % 2 else None for i in range(rows)],
            BIGQUERY_TO_ARROW[name],
        )
        for name, column in COLUMNS.items()
    }
    return pa.table(columns | {"LIST": pa.array([[1, 2], [3, 4], [], [5], [6], [7]])})


def chunked(table: pa.Table, *sizes: int) -> pa.Table:
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    slices = [table.slice(start, size) for start, size in zip(starts, sizes, strict=True)]
    return pa.concat_tables(slices)


def as_lists(data: Any) -> list[list[Any]]:
    if isinstance(data, np.ndarray):
        columns = [data[:, position].tolist() for position in range(data.shape[1])]
    else:
        columns = [data[name].to_list() for name in data.columns]
    return [
        [each.tolist() if isinstance(each, np.ndarray) else each for each in column]
        for column in columns
    ]


def dtypes_of(data: Any) -> list[Any]:
    if isinstance(data, np.ndarray):
        return [data.dtype]
    return list(data.dtypes)


@KINDS
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (3, 3), (0, 6), (2, 0, 4)])
@pytest.mark.parametrize("numbers_only", [True, False])
def test_a_table_in_pieces_gives_the_frame_of_the_same_table_in_one(
    kind: FrameKind, sizes: tuple[int, ...], numbers_only: bool
) -> None:
    table = wide_table()
    if numbers_only:
        table = table.select(["INT64", "BOOL", "NUMERIC"])
    pieces = chunked(table, *sizes)
    assert pieces.column(0).num_chunks == len(sizes)

    actual, expected = to_frame(pieces, kind), to_frame(table, kind)

    assert dtypes_of(actual) == dtypes_of(expected)
    for left, right in zip(as_lists(actual), as_lists(expected), strict=True):
        assert_same(left, right)


@KINDS
def test_chunks_put_together_again_are_the_frame_of_the_whole_table(kind: FrameKind) -> None:
    table = wide_table()
    whole = to_frame(table, kind)

    chunks = [to_frame(table.slice(start, 2), kind) for start in (0, 2, 4)]

    for chunk in chunks:
        assert dtypes_of(chunk) == dtypes_of(whole)
    together = [
        list(chain.from_iterable(parts)) for parts in zip(*map(as_lists, chunks), strict=True)
    ]
    for left, right in zip(together, as_lists(whole), strict=True):
        assert_same(left, right)


def test_columns_keep_their_order_and_their_names() -> None:
    names = ["b", "a", "Ä", "B c"]
    table = pa.table([pa.array([position]) for position in range(4)], names=names)

    assert list(to_frame(table, FrameKind.PANDAS).columns) == names
    assert to_frame(table, FrameKind.POLARS).columns == names
    assert to_frame(table, FrameKind.NUMPY).tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_an_array_is_of_floats_where_every_column_is_a_number_or_a_boolean() -> None:
    table = wide_table()
    numbers = [name for name, column in COLUMNS.items() if column.numpy == "float64"]

    assert [name for name in table.column_names if is_numeric(table.field(name).type)] == numbers
    array = to_frame(table.select(numbers), FrameKind.NUMPY)
    assert array.dtype == np.float64
    assert np.isnan(array[4]).all()
    assert array[0].tolist() == [2.0**53, 0.1, 1.5, 1.5, 1.0]


def test_an_array_with_one_column_of_words_is_the_one_that_pandas_gives() -> None:
    table = wide_table().select(["INT64", "FLOAT64", "NUMERIC", "BOOL", "STRING"])

    array = to_frame(table, FrameKind.NUMPY)

    assert array.dtype == object
    assert array[0].tolist() == [2**53 + 1, 0.1, Decimal("1.500000000"), True, ""]
    in_pandas = to_frame(table, FrameKind.PANDAS).to_numpy(dtype=object)
    assert_same(array[:4].ravel().tolist(), in_pandas[:4].ravel().tolist())
    # scikit-learn does not take NA in an array, which the first and the fourth are in pandas.
    assert_same(array[4].tolist(), [np.nan, np.nan, None, np.nan, np.nan])


@pytest.mark.parametrize("kind", [pa.decimal128(38, 9), pa.decimal256(76, 38)], ids=str)
def test_a_decimal_in_an_array_is_the_float_that_python_makes_of_it(kind: pa.DataType) -> None:
    values = [Decimal(cents) / 100 for cents in range(-2_000, 20_000)]

    array = to_frame(pa.table({"x": pa.array(values, kind)}), FrameKind.NUMPY)

    assert array[:, 0].tolist() == [float(value) for value in values]


@pytest.mark.parametrize("steps", [(), (SimpleImputer(strategy="most_frequent"),)], ids=len)
def test_a_model_of_bare_arrays_finds_missing_words_as_in_the_notebook(
    steps: tuple[Any, ...],
) -> None:
    table = pa.table({"city": ["Rome", None, "Oslo"] * 5, "age": [20.0, 30.0, None] * 5})
    in_notebook = to_frame(table, FrameKind.PANDAS).to_numpy()
    model = make_pipeline(*steps, OneHotEncoder(handle_unknown="ignore"), LinearRegression())
    model.fit(in_notebook, [10.0, 30.0, 20.0] * 5)

    answers = model.predict(to_frame(table, FrameKind.NUMPY))

    assert answers.tolist() == model.predict(in_notebook).tolist()
    assert answers[:3] == pytest.approx([10, 30, 20])


@KINDS
def test_a_model_that_writes_into_its_frame_does_not_change_the_table(kind: FrameKind) -> None:
    table = pa.table({"x": [1.0, 2.0], "y": [3.0, 4.0], "n": [5, 6]})
    for columns in (["x"], ["x", "y"], ["n"], ["x", "n"]):
        data = to_frame(table.select(columns), kind)

        if kind is FrameKind.NUMPY:
            data[:] = -1
        elif kind is FrameKind.PANDAS:
            data.loc[:, :] = -1
        else:
            for name in columns:
                data[[0, 1], name] = -1
        assert set(np.asarray(data).ravel().tolist()) == {-1}

        assert table.to_pydict() == {"x": [1.0, 2.0], "y": [3.0, 4.0], "n": [5, 6]}


def documented() -> dict[str, tuple[str, str]]:
    """The table of the module's docstring: the dtypes in pandas and numpy of each type."""
    lines = [
        re.split(r" {2,}|(?<=NUMERIC) ", line.strip())
        for line in frame.__doc__.splitlines()
        if line.startswith("    ") and not line.strip().startswith("BigQuery")
    ]
    without_remark = [(types, *(re.sub(r" \(.*", "", d) for d in both)) for types, *both in lines]
    return {
        name: (pandas, numpy)
        for types, pandas, numpy in without_remark
        for name in types.split(", ")
    }


def test_the_documented_dtypes_are_true() -> None:
    table = wide_table()
    actual = {
        name: (
            str(to_frame(table.select([name]), FrameKind.PANDAS).dtypes.iloc[0]),
            str(to_frame(table.select([name]), FrameKind.NUMPY).dtype),
        )
        for name in table.column_names
    }
    actual["ARRAY"] = actual.pop("LIST")

    assert documented() == actual
