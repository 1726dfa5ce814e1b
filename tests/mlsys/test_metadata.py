"""Golden rows: what a model answered where it was trained, and whether it still does."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from mlsys.errors import InvalidRequest
from mlsys.frame import FrameKind, to_frame
from mlsys.metadata import (
    FeatureMetadata,
    GoldenRows,
    ModelMetadata,
    describe_features,
    golden_mismatch,
    golden_rows,
    without_numpy,
)
from tests.mlsys.models import Answers, AnswersWithProbabilities, SeesTheSame
from tests.mlsys.test_frame_to_arrow import every_type

NAN, INFINITY = float("nan"), float("inf")


def there_and_back(model: Any, rows: pa.Table, kind: FrameKind) -> ModelMetadata:
    """The metadata of a model as the service reads it."""
    dtypes = [str(field.type) for field in rows.schema]
    metadata = ModelMetadata(
        features=describe_features(rows, dtypes), golden=golden_rows(model, rows, kind)
    )
    return ModelMetadata.model_validate_json(metadata.model_dump_json(exclude_none=True))


def mismatch(asked: Any, trained: Any, rows: int = 3, kind: FrameKind = FrameKind.NUMPY) -> Any:
    """How one model's answers differ from those of another, after a trip through metadata.json."""
    table = pa.table({"x": [float(row) for row in range(rows)]})
    return golden_mismatch(asked, there_and_back(trained, table, kind), kind)


class Remembers:
    """Keeps what it is asked."""

    def predict(self, rows: Any) -> np.ndarray:
        self.asked = rows
        return np.zeros(len(rows))


@pytest.mark.parametrize("kind", FrameKind)
@pytest.mark.parametrize("name", every_type().column_names)
def test_a_model_is_asked_again_exactly_what_it_was_asked(name: str, kind: FrameKind) -> None:
    rows = every_type().select([name])
    model = Remembers()

    assert golden_mismatch(model, there_and_back(model, rows, kind), kind) is None

    expected = to_frame(rows, kind)
    assert type(model.asked) is type(expected)
    if kind is FrameKind.NUMPY:
        assert repr(model.asked.tolist()) == repr(expected.tolist())
    else:
        assert model.asked[name].dtype == expected[name].dtype
        assert repr(model.asked[name].to_list()) == repr(expected[name].to_list())


@pytest.mark.parametrize("kind", [FrameKind.PANDAS, FrameKind.POLARS])
def test_a_model_that_looks_at_every_type_agrees_with_itself(kind: FrameKind) -> None:
    model = SeesTheSame().fit(to_frame(every_type(), kind))

    assert golden_mismatch(model, there_and_back(model, every_type(), kind), kind) is None


def test_nan_null_and_the_infinities_are_four_values_in_polars() -> None:
    rows = pa.table({"x": [NAN, None, INFINITY, -INFINITY], "a": [[NAN], [], [INFINITY], [1.5]]})
    model = Remembers()

    golden_mismatch(model, there_and_back(model, rows, FrameKind.POLARS), FrameKind.POLARS)

    assert repr(model.asked["x"].to_list()) == "[nan, None, inf, -inf]"
    assert repr(model.asked["a"].to_list()) == "[[nan], [], [inf], [1.5]]"


@pytest.mark.parametrize(
    "answers",
    [
        np.array([1, 2, 3]),
        np.array([0.1, 1e300, -0.0]),
        np.array([NAN, INFINITY, -INFINITY]),
        np.array([1.5, 2.5, 3.5], dtype=np.float32),
        np.array([True, False, True]),
        np.array(["a", "Ø", ""]),
        np.array(["a", None, "b"], dtype=object),
        np.array([np.int64(1), np.str_("a"), 2.5], dtype=object),
        np.array([b"\xff", b"", b"x"], dtype=object),
        np.array([dt.date(2020, 1, 1), Decimal("1.5"), dt.time(1)], dtype=object),
        np.array(["2020-01-01", "2020-01-02", "NaT"], dtype="datetime64[us]"),
        np.array([[1, 2], [3, 4], [5, 6]]),
        np.array([[1.5, NAN], [INFINITY, 4.0], [5.0, 6.0]]),
        np.array([["a", "b"], ["c", "d"], ["e", "f"]]),
        ["a", "b", "c"],
    ],
    ids=lambda answers: str(getattr(answers, "dtype", "list")),
)
def test_any_answer_agrees_with_itself_and_not_with_another(answers: Any) -> None:
    assert mismatch(Answers(answers), Answers(answers)) is None

    others = np.array(answers)
    others[[0, 1]] = others[[1, 0]]
    assert mismatch(Answers(others), Answers(answers)) == "2 of 3 predictions differ"


def test_sparse_answers_are_taken_for_what_they_mean() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    labels = np.array([[1, 0], [0, 1], [1, 1]])

    assert mismatch(Answers(labels), Answers(sparse.csr_matrix(labels))) is None
    assert mismatch(Answers(sparse.csr_matrix(1 - labels)), Answers(labels))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([1.0 + 1e-9, 2.0, 3.0], None),
        ([1.0 + 1e-4, 2.0, 3.0], "1 of 3"),
        ([NAN, 2.0, 3.0], "1 of 3"),
        ([[1.0], [2.0], [3.0]], "3 of 3"),
        (["1.0", "2.0", "3.0"], "3 of 3"),
    ],
)
def test_numbers_may_differ_by_what_a_library_rounds_and_no_more(
    asked: list[Any], told: str | None
) -> None:
    trained = np.array([1.0, 2.0, 3.0])

    assert mismatch(Answers(np.array(asked)), Answers(trained)) == (
        told and f"{told} predictions differ"
    )


@pytest.mark.parametrize(
    ("trained", "asked"),
    [
        (["yes", "no", "yes"], [1.5, 2.5, 3.5]),
        ([1, 2, 3], [[1, 2], [3, 4], [5, 6]]),
        ([1.0, 2.0, 3.0], ["a", "b", "c"]),
    ],
)
def test_answers_of_another_kind_differ(trained: list[Any], asked: list[Any]) -> None:
    told = mismatch(Answers(np.array(asked)), Answers(np.array(trained)))

    assert told == "3 of 3 predictions differ"


def test_an_answer_a_row_is_asked_for_where_a_model_is_trained_and_where_it_is_loaded() -> None:
    rows = pa.table({"x": [0.0, 1.0, 2.0]})
    few, told = Answers(np.zeros(1)), "it gives 1 answers for 3 rows"

    with pytest.raises(InvalidRequest, match=rf"{told}\..*ColumnTransformer"):
        golden_rows(few, rows, FrameKind.PANDAS)

    # As publish_model once wrote it.
    metadata = ModelMetadata(
        features=describe_features(rows, ["float64"]),
        golden=GoldenRows(rows=rows.to_pylist(), predictions=[0.0]),
    )
    assert (golden_mismatch(few, metadata, FrameKind.PANDAS) or "").startswith(told)
    assert (mismatch(few, Answers(np.zeros(3))) or "").startswith(told)


@pytest.mark.parametrize(
    ("predictions", "width"), [([1, 2], 1), ([[1, 2, 3]], 3), ([["a"], ["b"]], 1), ([], 1)]
)
def test_golden_rows_tell_how_many_columns_a_model_predicts(
    predictions: list[Any], width: int
) -> None:
    assert GoldenRows(rows=[], predictions=predictions).width == width


def test_probabilities_are_compared_as_well() -> None:
    labels = np.array([0, 1, 0])
    trained = AnswersWithProbabilities(labels, np.array([[0.9, 0.1], [0.2, 0.8], [NAN, 0.4]]))
    asked = AnswersWithProbabilities(labels, np.array([[0.9, 0.1], [0.3, 0.7], [NAN, 0.4]]))

    assert mismatch(trained, trained) is None
    assert mismatch(asked, trained) == "1 of 3 probabilities differ"
    assert mismatch(Answers(labels), trained) == "it gives no probabilities"
    assert mismatch(asked, Answers(labels)) is None


def test_of_several_targets_the_labels_say_enough() -> None:
    labels = np.array([[0, 1], [1, 1], [0, 0]])
    model = AnswersWithProbabilities(labels, [np.ones((3, 2)), np.ones((3, 2))])

    class Several(AnswersWithProbabilities):
        def predict_proba(self, rows: Any) -> Any:
            return self.probabilities

    several = Several(labels, model.probabilities)
    assert mismatch(several, several) is None


def test_a_model_that_raises_is_told_without_its_words() -> None:
    class Raises:
        def predict(self, rows: Any) -> None:
            raise KeyError("a value of a row")

    assert mismatch(Raises(), Answers(np.zeros(3))) == "it raises KeyError"


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"y": 1.0}], "FLOAT64"),
        ([{"x": "a"}], "FLOAT64"),
        ([{"x": "a"}], "INT64"),
        ([{"x": "yesterday"}], "DATE"),
        ([{"x": "a"}], "NUMERIC"),
        ([{"x": "a"}], "BYTES"),
        ([{"x": 1}], "TIMESTAMP"),
        ([{"x": 1}], "ARRAY<INT64>"),
        ([{"x": 1}], "GEOGRAPHY"),
    ],
)
def test_golden_rows_that_can_not_be_read_are_told_so(rows: list[Any], kind: str) -> None:
    metadata = ModelMetadata(
        features=[FeatureMetadata(name="x", type=kind)],
        golden=GoldenRows(rows=rows, predictions=[0.0]),
    )

    told = golden_mismatch(Answers(np.zeros(1)), metadata, FrameKind.PANDAS)

    assert told == "its golden rows in metadata.json can't be read"


@pytest.mark.parametrize(
    "metadata",
    [
        ModelMetadata(),
        ModelMetadata(features=["x"]),
        ModelMetadata(features=["x"], golden=GoldenRows(rows=[{"x": 1}], predictions=[7])),
        ModelMetadata(
            features=[FeatureMetadata(name="x", type="INT64")],
            golden=GoldenRows(rows=[], predictions=[]),
        ),
    ],
)
def test_without_golden_rows_or_types_there_is_nothing_to_ask(metadata: ModelMetadata) -> None:
    assert golden_mismatch(object(), metadata, FrameKind.PANDAS) is None


def test_features_are_described_by_bigquerys_types_and_those_of_the_training() -> None:
    rows = pa.table({"a": [1], "b": [["x"]], "c": pa.array([1], pa.timestamp("us", "UTC"))})

    told = describe_features(rows, ["int64", "object", "datetime64[ns, UTC]"])

    assert [each.model_dump() for each in told] == [
        {"name": "a", "type": "INT64", "dtype": "int64"},
        {"name": "b", "type": "ARRAY<STRING>", "dtype": "object"},
        {"name": "c", "type": "TIMESTAMP", "dtype": "datetime64[ns, UTC]"},
    ]


def test_metadata_may_be_written_by_hand() -> None:
    text = (
        '{"features": ["a", {"name": "b", "type": "INT64", "unit": "m"}], "target": ["y"], "x": 1}'
    )

    metadata = ModelMetadata.model_validate_json(text)

    assert [each.name for each in metadata.typed_features()] == ["a", "b"]
    assert metadata.targets == ["y"]
    assert json.loads(metadata.model_dump_json(exclude_none=True)) == json.loads(text)
    assert ModelMetadata(target="y").targets == ["y"]
    assert ModelMetadata().targets == []
    with pytest.raises(ValidationError, match="frame"):
        ModelMetadata.model_validate_json('{"frame": "excel"}')


def test_what_json_has_no_word_for_is_kept_as_text() -> None:
    metadata = ModelMetadata(metrics={"auc": NAN, "loss": INFINITY})

    assert json.loads(metadata.model_dump_json(exclude_none=True)) == {
        "metrics": {"auc": "NaN", "loss": "Infinity"}
    }
    assert without_numpy(np.float32(1.5)) == 1.5
    assert without_numpy(np.arange(2)) == [0, 1]
    assert without_numpy(range(2)) == "range(0, 2)"
