"""A frame as BigQuery takes it: each column in BigQuery's own type, or refused by its name."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from mlsys.errors import InvalidRequest
from mlsys.frame import FrameKind, to_arrow, to_frame
from mlsys.tables import BIGQUERY_TO_ARROW, bigquery_column, standard_type

NUMERIC, BIGNUMERIC = BIGQUERY_TO_ARROW["NUMERIC"], BIGQUERY_TO_ARROW["BIGNUMERIC"]
DATETIME, TIMESTAMP = BIGQUERY_TO_ARROW["DATETIME"], BIGQUERY_TO_ARROW["TIMESTAMP"]
UTC, BERLIN = dt.UTC, ZoneInfo("Europe/Berlin")
DAY, NOON = dt.date(2020, 6, 1), dt.datetime(2020, 6, 1, 12)
NAN = float("nan")

EVERY_TYPE = {
    "INT64": [-(2**63), None, 2**63 - 1],
    "FLOAT64": [0.1, None, float("-inf")],
    "BOOL": [True, None, False],
    "STRING": ["", None, "Ørsted"],
    "BYTES": [b"", None, b"\xff\x00"],
    "DATE": [dt.date(1, 1, 1), None, dt.date(9999, 12, 31)],
    "TIME": [dt.time(), None, dt.time(23, 59, 59, 999999)],
    "DATETIME": [dt.datetime(1, 1, 1), None, dt.datetime(9999, 12, 31, 23, 59, 59, 999999)],
    "TIMESTAMP": [dt.datetime(1, 1, 1, tzinfo=UTC), None, dt.datetime(9999, 12, 31, tzinfo=UTC)],
    "NUMERIC": [Decimal("0.000000001"), None, Decimal("-" + "9" * 29)],
    "BIGNUMERIC": [Decimal("1e-38"), None, Decimal("5" + "0" * 37)],
}


def every_type() -> pa.Table:
    """A column of each type that a table can have, and one of arrays of it."""
    columns = {}
    for name, values in EVERY_TYPE.items():
        kind = BIGQUERY_TO_ARROW[name]
        columns[name] = pa.array(values, kind)
        columns[f"{name}_ARRAY"] = pa.array([values[::2], [], values[:1]], pa.list_(kind))
    return pa.table(columns)


def column(frame: Any) -> pa.ChunkedArray:
    return to_arrow(frame).column("x")


def pandas(values: Any, dtype: Any = None) -> pd.DataFrame:
    return pd.DataFrame({"x": pd.Series(values, dtype=dtype)})


def polars(values: Any, dtype: Any = None) -> pl.DataFrame:
    return pl.DataFrame({"x": pl.Series(values, dtype=dtype)})


def test_every_type_that_a_table_can_have_is_looked_at() -> None:
    assert set(EVERY_TYPE) == set(BIGQUERY_TO_ARROW)


def test_an_arrow_table_in_bigquerys_types_is_left_as_it_is() -> None:
    table = every_type()

    assert to_arrow(table).equals(table)
    [batch] = table.to_batches()
    assert to_arrow(batch).equals(table)


NAMES = every_type().column_names


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_with_pandas_is_written_as_it_was(name: str) -> None:
    table = every_type().select([name])

    assert to_arrow(to_frame(table, FrameKind.PANDAS)).equals(table)


# Polars has no decimal that wide.
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("BIGNUMERIC")])
def test_what_was_read_with_polars_is_written_as_it_was(name: str) -> None:
    table = every_type().select([name])

    assert to_arrow(to_frame(table, FrameKind.POLARS)).equals(table)


@pytest.mark.parametrize(
    ("frame", "kind", "values"),
    [
        (pandas([1, 2], "int8"), pa.int64(), [1, 2]),
        (pandas([1, 2], "uint64"), pa.int64(), [1, 2]),
        (pandas([1, None], "Int32"), pa.int64(), [1, None]),
        (pandas([1, None], "int64[pyarrow]"), pa.int64(), [1, None]),
        (pandas([1, pd.NA], object), pa.int64(), [1, None]),
        (pandas([1.5, NAN], "float32"), pa.float64(), [1.5, None]),
        (pandas([1.5, None], "Float64"), pa.float64(), [1.5, None]),
        (pandas([1, 2.5, None], object), pa.float64(), [1, 2.5, None]),
        (pandas([True, None], "boolean"), pa.bool_(), [True, None]),
        (pandas([True, None], object), pa.bool_(), [True, None]),
        (pandas(["a", None], "str"), pa.string(), ["a", None]),
        (pandas(["a", None], "string"), pa.string(), ["a", None]),
        (pandas(["a", NAN, pd.NA], object), pa.string(), ["a", None, None]),
        (pandas(["a", None], "category"), pa.string(), ["a", None]),
        (pandas([3, None], "category"), pa.int64(), [3, None]),
        (pandas([], "category"), pa.string(), []),
        (pandas([None, None], object), pa.string(), [None, None]),
        (pandas([b"a", None]), pa.binary(), [b"a", None]),
        (pandas([DAY, None]), pa.date32(), [DAY, None]),
        (pandas([dt.time(1), None]), pa.time64("us"), [dt.time(1), None]),
        (pandas([NOON, None], "datetime64[s]"), DATETIME, [NOON, None]),
        (pandas([NOON, None], "datetime64[ns]"), DATETIME, [NOON, None]),
        (pandas([NOON, pd.NaT], object), DATETIME, [NOON, None]),
        (
            pandas([NOON.replace(tzinfo=BERLIN)]),
            TIMESTAMP,
            [dt.datetime(2020, 6, 1, 10, tzinfo=UTC)],
        ),
        (pandas([Decimal("1.5"), None, Decimal("NaN")]), NUMERIC, [Decimal("1.5"), None, None]),
        (pandas([Decimal("1.5"), 2], object), NUMERIC, [Decimal("1.5"), Decimal(2)]),
        (pandas([Decimal("1e-10")]), BIGNUMERIC, [Decimal("1e-10")]),
        (pandas([Decimal(10**30)]), BIGNUMERIC, [Decimal(10**30)]),
        (pandas([[1, 2], None, []]), pa.list_(pa.int64()), [[1, 2], [], []]),
        (pandas([[NOON], None, [NOON, NOON]]), pa.list_(DATETIME), [[NOON], [], [NOON, NOON]]),
        (pandas([(1, 2), (3,)]), pa.list_(pa.int64()), [[1, 2], [3]]),
        (pandas([np.array(["a"]), np.array([], object)]), pa.list_(pa.string()), [["a"], []]),
        (pandas([[Decimal(10**30)]]), pa.list_(BIGNUMERIC), [[Decimal(10**30)]]),
        (polars([1, 2], pl.UInt8), pa.int64(), [1, 2]),
        (polars([1.5, None], pl.Float32), pa.float64(), [1.5, None]),
        (polars([None, None]), pa.string(), [None, None]),
        (polars(["a", None], pl.Categorical), pa.string(), ["a", None]),
        (polars(["a", None], pl.Enum(["a", "b"])), pa.string(), ["a", None]),
        (polars([dt.time(1)]), pa.time64("us"), [dt.time(1)]),
        (polars([NOON], pl.Datetime("ms")), DATETIME, [NOON]),
        (polars([NOON], pl.Datetime("ns", "UTC")), TIMESTAMP, [NOON.replace(tzinfo=UTC)]),
        (polars([Decimal("1.5")]), NUMERIC, [Decimal("1.5")]),
        (polars([Decimal("1e-10")]), BIGNUMERIC, [Decimal("1e-10")]),
        (polars([[1, 2], None]), pa.list_(pa.int64()), [[1, 2], []]),
        (polars([[1, 2], None], pl.Array(pl.Int8, 2)), pa.list_(pa.int64()), [[1, 2], []]),
        (pa.table({"x": pa.array(["a"]).dictionary_encode()}), pa.string(), ["a"]),
        (pa.table({"x": pa.array(["a"], pa.string_view())}), pa.string(), ["a"]),
        (pa.table({"x": pa.array([b"ab"], pa.binary(2))}), pa.binary(), [b"ab"]),
        (pa.table({"x": pa.array([DAY], pa.date64())}), pa.date32(), [DAY]),
        (pa.table({"x": pa.array([Decimal(100)], pa.decimal128(5, -2))}), NUMERIC, [Decimal(100)]),
        (pa.table({"x": pa.array([Decimal(1)], pa.decimal256(60, 0))}), NUMERIC, [Decimal(1)]),
    ],
    ids=lambda each: "" if isinstance(each, list | pa.DataType) else None,
)
def test_a_column_is_brought_to_bigquerys_own_type(
    frame: Any, kind: pa.DataType, values: list[Any]
) -> None:
    stored = column(frame)

    assert stored.type == kind
    assert stored.to_pylist() == values
    assert standard_type(bigquery_column(pa.field("x", stored.type)))


def test_a_nan_of_polars_stays_one_and_its_null_stays_another() -> None:
    nan, null = column(polars([NAN, None])).to_pylist()

    assert np.isnan(nan)
    assert null is None


@pytest.mark.parametrize(
    "frame", [pandas([[1.5, NAN]]), polars([[1.5, NAN]]), polars([[1.5, None]])]
)
def test_a_missing_number_in_an_array_is_nan(frame: Any) -> None:
    [[first, second]] = column(frame).to_pylist()

    assert first == 1.5
    assert np.isnan(second)


def test_a_pandas_index_is_left_behind() -> None:
    frame = pd.DataFrame({"x": [1]}, index=pd.Index([7], name="key"))

    assert to_arrow(frame).column_names == ["x"]
    assert to_arrow(frame).schema.metadata is None


def test_columns_keep_their_order_and_rows_theirs_in_a_frame_that_was_cut_and_shuffled() -> None:
    frame = pd.DataFrame({"b": range(10), "a": list("abcdefghij")}).iloc[[7, 2, 5]]

    assert to_arrow(frame).to_pydict() == {"b": [7, 2, 5], "a": ["h", "c", "f"]}
    assert to_arrow(pl.from_pandas(frame)[1:]).to_pydict() == {"b": [2, 5], "a": ["c", "f"]}


def test_a_frame_without_rows_keeps_its_types() -> None:
    for frame in (pandas([], "Int64"), polars([], pl.Int64), pa.table({"x": pa.array([], "i8")})):
        assert column(frame).type == pa.int64()
        assert len(column(frame)) == 0


OBJECT_ADDRESSES = polars([object()], pl.Object)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (pandas([1, "a"]), "astype"),
        (pandas([1, True], object), "astype"),
        (pandas([b"a", "a"]), "astype"),
        (pandas([DAY, NOON], object), "astype"),
        (pandas([NOON, DAY], object), "astype"),
        (pandas([NOON, NOON.replace(tzinfo=UTC)], object), "astype"),
        (pandas([[NOON, NOON.replace(tzinfo=UTC)]]), "astype"),
        (pandas([[NOON], None, [DAY, None]]), "astype"),
        (pandas([pd.Timestamp(NOON) + pd.Timedelta(1, "ns"), None], object), "round times"),
        (pandas([[pd.Timestamp(NOON, tz="UTC") + pd.Timedelta(1, "ns")]]), "round times"),
        (pandas([[1], "a"]), "astype"),
        (pandas([object()]), "astype"),
        (pandas([1j]), "complex128"),
        (pandas([2**70], object), "astype"),
        (pandas([Decimal("Infinity")]), "astype"),
        (pandas(["\ud800"], object), "astype"),
        (pandas(pd.arrays.SparseArray([0, 0, 1])), "Sparse"),
        (pandas([np.eye(2)]), "astype"),
        (pandas([2**63], "uint64"), "without a loss"),
        (pandas(["2020-01-01T00:00:00.000000001"], "datetime64[ns]"), "without a loss"),
        (pandas([Decimal("1e40")]), "without a loss"),
        (pandas([Decimal("1e-40")]), "without a loss"),
        (pandas([dt.timedelta(1)]), "duration"),
        (pandas([pd.Interval(0, 1)]), "interval"),
        (pandas(pd.period_range("2020", periods=1, freq="Y")), "period"),
        (pandas([{"a": 1}]), "struct"),
        (pandas([[[1]]]), "list"),
        (pandas([[1, None]]), "no nulls"),
        (pandas([["a", None]]), "no nulls"),
        (polars([[1, None]]), "no nulls"),
        (polars([[[1]]]), "list"),
        (polars([{"a": 1}]), "struct"),
        (polars([dt.timedelta(1)]), "duration"),
        (polars([1], pl.Int128), "Int128"),
        (OBJECT_ADDRESSES, "Object"),
        (pa.table({"x": pa.array([{"a": 1}])}), "struct"),
        (pa.table({"x": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))}), "map"),
        (pa.table({"x": pa.array([b"0" * 16], pa.uuid())}), "uuid"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_column_that_bigquery_can_not_store_is_named(frame: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        to_arrow(frame)

    assert "'x'" in str(refused.value)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([0], "Column 0"),
        ([None], "Column None"),
        (pd.MultiIndex.from_tuples([("a", "b")]), "Column ('a', 'b')"),
        ([""], "Column ''"),
        (["a.b"], "Column 'a.b'"),
        (["a`b"], "Column 'a`b'"),
        (["a\nb"], r"Column 'a\nb'"),
        (["x" * 301], "at most 300"),
    ],
)
def test_a_name_that_no_column_of_bigquery_can_have_is_told(names: Any, told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        to_arrow(pd.DataFrame([[1]], columns=names))

    assert told in str(refused.value)


@pytest.mark.parametrize("name", ["a b", "Größe", "a-b", "a%", "x" * 300])
def test_a_flexible_name_is_taken(name: str) -> None:
    for frame in (pd.DataFrame({name: [1]}), pl.DataFrame({name: [1]}), pa.table({name: [1]})):
        assert to_arrow(frame).column_names == [name]


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame([[1, 2, 3]], columns=["Age", "x", "AGE"]),
        pd.DataFrame([[1, 2, 3]], columns=["Age", "x", "Age"]),
        pl.DataFrame({"Age": [1], "x": [2], "AGE": [3]}),
        pa.Table.from_arrays([pa.array([1])] * 3, ["Age", "x", "Age"]),
    ],
    ids=["pandas", "pandas, the same", "polars", "Arrow"],
)
def test_names_that_differ_in_case_only_are_told(frame: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"columns Age, (AGE|Age) have one name"):
        to_arrow(frame)


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame(index=[1, 2]), pl.DataFrame()])
def test_a_frame_without_columns_is_refused(frame: Any) -> None:
    with pytest.raises(InvalidRequest, match="no columns"):
        to_arrow(frame)


@pytest.mark.parametrize(
    "thing", [pd.Series([1]), pl.LazyFrame({"x": [1]}), np.eye(2), [{"x": 1}], None]
)
def test_what_is_no_frame_is_told_so(thing: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"A {type(thing).__name__} is no frame"):
        to_arrow(thing)
