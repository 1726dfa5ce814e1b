"""Every kind of model, end to end: what stands in the output table is what the model says.

Each model is trained on the frame that the library makes of a table, predicts that same table
through the service, and is compared with its own answers, row for row by id.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from mlsys.frame import FrameKind, to_frame
from mlsys.local import sample
from tests.conftest import Client, Cloud
from tests.service.estimators import dates_taken_apart, polars_features

TOLD = ["PredictionTimestamp", "ModelName", "ModelVersion"]
ROWS = 500


def table(**columns: Any) -> pa.Table:
    """A table of `ROWS` rows with an id, some numbers and whatever else is given."""
    random = np.random.default_rng(7)
    numbers = {name: random.normal(size=ROWS) for name in ("a", "b", "c")}
    return pa.table({"id": np.arange(ROWS), **numbers, **columns})


def with_nulls(values: Sequence[Any], kind: pa.DataType, every: int = 7) -> pa.Array:
    return pa.array([None if n % every == 0 else v for n, v in enumerate(values)], kind)


@dataclass(frozen=True)
class Case:
    """A model, and the table that it is trained on and predicts."""

    model: Any
    features: list[str]
    label: Callable[[pa.Table], Any]
    data: pa.Table = field(default_factory=table)
    frame: FrameKind = FrameKind.PANDAS
    metadata: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=lambda: {"Prediction": "FLOAT64"})


def a_plus_b(data: pa.Table) -> np.ndarray:
    return data["a"].to_numpy() + data["b"].to_numpy()


def sign(data: pa.Table) -> np.ndarray:
    return (a_plus_b(data) > 0).astype("int64")


def size(data: pa.Table) -> np.ndarray:
    return np.select([a_plus_b(data) < -0.5, a_plus_b(data) < 0.5], ["small", "mid size"], "big")


def titanic(labels: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    words = make_pipeline(
        SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")
    )
    columns = make_column_transformer(
        (numbers, ["Age", "Fare", "SibSp"]), (words, ["Pclass", "Sex", "Embarked"])
    )
    data = sample("titanic_train").rename_columns(["id", *sample("titanic_train").column_names[1:]])
    return {
        "model": make_pipeline(columns, RandomForestClassifier(20, random_state=0)),
        "features": ["Pclass", "Sex", "Age", "SibSp", "Fare", "Embarked"],
        "label": lambda rows: labels(rows["Survived"].to_numpy()),
        "data": data,
    }


PROBABILITY = {"Prediction": "INT64", "PredictionProbability": "FLOAT64"}
THREE = {"Prediction": "STRING"} | {
    f"PredictionProbability_{name}": "FLOAT64" for name in ("big", "mid_size", "small")
}
ABC = ["a", "b", "c"]

CASES = {
    "titanic, strings and nulls": Case(
        **titanic(lambda survived: survived),
        metadata={"target": "Prediction"},
        outputs=PROBABILITY,
    ),
    "a boolean target": Case(
        **titanic(lambda survived: survived == 1), outputs=PROBABILITY | {"Prediction": "BOOL"}
    ),
    "three classes with string labels": Case(LogisticRegression(), ABC, size, outputs=THREE),
    "boosted trees": Case(
        HistGradientBoostingClassifier(max_iter=5), ABC, sign, outputs=PROBABILITY
    ),
    "neighbours that vote": Case(KNeighborsClassifier(4), ABC, sign, outputs=PROBABILITY),
    "a grid search over a pipeline": Case(
        GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [1, 9]}
        ),
        ABC,
        sign,
        outputs=PROBABILITY,
    ),
    "a classifier without probabilities": Case(
        LinearSVC(), ABC, sign, outputs={"Prediction": "INT64"}
    ),
    "regression": Case(LinearRegression(), ABC, a_plus_b),
    "two targets, named": Case(
        LinearRegression(),
        ABC,
        lambda data: np.column_stack([a_plus_b(data), data["c"].to_numpy() * 3]),
        metadata={"target": ["sum", "triple"]},
        outputs={"sum": "FLOAT64", "triple": "FLOAT64"},
    ),
    "two targets, not named": Case(
        LinearRegression(),
        ABC,
        lambda data: np.column_stack([a_plus_b(data), data["c"].to_numpy() * 3]),
        outputs={"Prediction_0": "FLOAT64", "Prediction_1": "FLOAT64"},
    ),
    "a clusterer": Case(
        KMeans(3, n_init=1, random_state=0), ABC, a_plus_b, outputs={"Prediction": "INT64"}
    ),
    "an outlier detector": Case(
        IsolationForest(n_estimators=10, random_state=0),
        ABC,
        a_plus_b,
        outputs={"Prediction": "INT64"},
    ),
    "a bare array": Case(
        RandomForestClassifier(10, random_state=0),
        ["c", "a", "b"],
        sign,
        frame=FrameKind.NUMPY,
        metadata={"features": ["c", "a", "b"]},
        outputs=PROBABILITY,
    ),
    "columns in another order in the table": Case(
        LinearRegression(), ["c", "b", "a"], lambda data: data["c"].to_numpy() - a_plus_b(data) * 2
    ),
    "whole numbers with nulls": Case(
        make_pipeline(SimpleImputer(strategy="constant", fill_value=-1), LinearRegression()),
        ["n", "a"],
        a_plus_b,
        data=table(n=with_nulls(range(ROWS), pa.int64(), every=200)),
    ),
    "NUMERIC, DATE and TIMESTAMP": Case(
        make_pipeline(FunctionTransformer(dates_taken_apart), SimpleImputer(), LinearRegression()),
        ["price", "born", "seen"],
        a_plus_b,
        data=table(
            price=with_nulls([Decimal(n) / 4 for n in range(ROWS)], pa.decimal128(38, 9)),
            born=with_nulls([dt.date(1950 + n % 70, 1, 1) for n in range(ROWS)], pa.date32()),
            seen=with_nulls(
                [dt.datetime(2024, 1, 1, n % 24, 0, 0, n, dt.UTC) for n in range(ROWS)],
                pa.timestamp("us", "UTC"),
            ),
        ),
    ),
    "a polars frame": Case(
        make_pipeline(FunctionTransformer(polars_features), LinearRegression()),
        ["word", "amount"],
        a_plus_b,
        data=table(
            word=with_nulls(["banana", "fig", "kiwi"] * ROWS, pa.string())[:ROWS],
            amount=with_nulls(range(ROWS), pa.int64()),
        ),
        frame=FrameKind.POLARS,
        metadata={"frame": "polars"},
    ),
    "booleans": Case(
        LogisticRegression(),
        ["yes", "a"],
        sign,
        data=table(yes=np.arange(ROWS) % 3 == 0),
        outputs=PROBABILITY,
    ),
    "10 of 300 columns": Case(
        LinearRegression(),
        [f"w{n}" for n in range(0, 300, 30)],
        a_plus_b,
        data=table(**{f"w{n}": np.random.default_rng(n).normal(size=ROWS) for n in range(300)}),
    ),
    "one row": Case(LinearRegression(), ABC, a_plus_b, data=table().slice(3, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("chunk_rows", [None, 64], ids=["whole", "in chunks"])
def test_predictions_are_the_models_own(
    case: Case, chunk_rows: int | None, service: Client, cloud: Cloud
) -> None:
    frame = to_frame(case.data.select(case.features), case.frame)
    model = fitted(case, frame)
    name = cloud.publish(model, **case.metadata)
    path, output = cloud.put(case.data), cloud.new_table()
    chunks = {} if chunk_rows is None else {"chunk_rows": chunk_rows}

    response = service.predict(path, output, name, id_columns="id", **chunks)

    assert response.status_code == 200, response.text
    assert response.json()["rows"] == case.data.num_rows
    columns = cloud.columns(output)
    assert list(columns) == ["id", *case.outputs, *TOLD]
    assert {name: columns[name] for name in case.outputs} == case.outputs
    rows = {row["id"]: row for row in cloud.rows(output)}
    assert sorted(rows) == sorted(case.data["id"].to_pylist())
    in_order = [rows[each] for each in case.data["id"].to_pylist()]
    probabilities = [each for each in case.outputs if each.startswith("PredictionProbability")]
    labels = [each for each in case.outputs if each not in probabilities]
    assert_same(in_order, labels, model.predict(frame))
    if probabilities:
        expected = model.predict_proba(frame)
        assert_same(
            in_order, probabilities, expected[:, 1:] if len(probabilities) == 1 else expected
        )


def fitted(case: Case, frame: Any) -> Any:
    # Of one row nothing can be learned: that model has seen the whole table.
    if case.data.num_rows == 1:
        whole = table()
        return case.model.fit(to_frame(whole.select(case.features), case.frame), case.label(whole))
    return case.model.fit(frame, case.label(case.data))


def assert_same(rows: list[dict[str, Any]], columns: list[str], expected: np.ndarray) -> None:
    """Compares columns with an array of shape (n,) or (n, k): labels exactly, floats closely."""
    actual = [[row[column] for column in columns] for row in rows]
    wanted = np.asarray(expected).reshape(len(rows), -1)
    if wanted.dtype.kind == "f":
        np.testing.assert_allclose(np.array(actual, dtype=float), wanted, rtol=1e-9, atol=1e-12)
    else:
        assert actual == wanted.tolist()


def test_a_table_without_rows_makes_an_output_table_without_rows(
    service: Client, cloud: Cloud
) -> None:
    data = table()
    frame = to_frame(data.select(ABC), FrameKind.PANDAS)
    name = cloud.publish(RandomForestClassifier(5).fit(frame, size(data)))
    output = cloud.new_table()

    response = service.predict(cloud.put(data.slice(0, 0)), output, name)

    assert response.status_code == 200, response.text
    assert response.json()["rows"] == 0
    assert list(cloud.columns(output)) == ["id", *THREE, *TOLD]
    assert cloud.count(output) == 0


def test_several_streams_give_every_row_once(service: Client, cloud: Cloud) -> None:
    rows = 100_000
    data = pa.table({"id": np.arange(rows), "a": np.arange(rows) / 7, "b": np.ones(rows)})
    frame = to_frame(data.select(["a", "b"]), FrameKind.PANDAS)
    name = cloud.publish(LinearRegression().fit(frame, frame["a"] * 2))
    output = cloud.new_table()

    response = service.predict(cloud.put(data), output, name)

    assert response.status_code == 200, response.text
    found = cloud.rows(output, order_by="id")
    assert [row["id"] for row in found] == list(range(rows))
    np.testing.assert_allclose([row["Prediction"] for row in found], data["a"].to_numpy() * 2)
