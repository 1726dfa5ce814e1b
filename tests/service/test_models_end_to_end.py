"""Every kind of model, through the real service: each row's prediction is that of the notebook."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from mlsys.bq import bq_get
from mlsys.frame import FrameKind, to_frame
from mlsys.local import sample
from mlsys.names import TableRef
from mlsys.read import open_session
from mlsys.tables import standard_type
from tests.conftest import Client, Cloud
from tests.service.estimators import (
    Stateless,
    checked_nullable,
    dates_taken_apart,
    lengths_of_lists,
    polars_features,
)

TOLD = ["PredictionTimestamp", "ModelName", "ModelVersion"]
WORDS = np.array(["setosa", "versicolor", "virginica"])


def numbers(rows: int = 60, seed: int = 0) -> pa.Table:
    """A table of `id`, in no order, and of three numbers."""
    random = np.random.default_rng(seed)
    a, b, c = random.normal(size=(3, rows)).round(2)
    return pa.table({"id": random.permutation(rows), "a": a, "b": b, "c": c})


FEATURES = ["a", "b", "c"]
NUMBERS = numbers()
FRAME = to_frame(NUMBERS.select(FEATURES), FrameKind.PANDAS)
ARRAY = FRAME.to_numpy()
BINARY = (FRAME["a"] + FRAME["b"] > 0).astype("int64")
CLASSES = WORDS[np.digitize(FRAME["a"], [-0.5, 0.5])]
AMOUNT = FRAME["a"] * 2 - FRAME["c"]
TWO_AMOUNTS = np.column_stack([AMOUNT, FRAME["b"]])


def predict(
    service: Client,
    cloud: Cloud,
    model: Any,
    data: pa.Table | str,
    *,
    metadata: Mapping[str, Any] | None = None,
    output: str | None = None,
    rows: int | None = None,
    **request: Any,
) -> str:
    """Publishes a model, stores a table and predicts it; returns the output table."""
    name = cloud.publish(model, **(metadata or {}))
    source = data if isinstance(data, str) else cloud.put(data)
    output = output or cloud.new_table("scored")
    response = service.predict(source, output, name, **request)
    assert response.status_code == 200, response.text
    if rows is None and not isinstance(data, str):
        rows = data.num_rows
    assert response.json()["rows"] == rows
    return output


def by_id(rows: list[dict[str, Any]], key: str = "id") -> dict[Any, dict[str, Any]]:
    """The rows of an output table by their id, each of which is there once."""
    found = {row[key]: row for row in rows}
    assert len(found) == len(rows)
    return found


def in_order_of(
    data: pa.Table, rows: list[dict[str, Any]], name: str, key: str = "id"
) -> list[Any]:
    """A column of an output table in the order of the input's rows, id by id."""
    found = by_id(rows, key)
    ids = data[key].to_pylist()
    assert found.keys() == set(ids)
    return [found[each][name] for each in ids]


def kinds(cloud: Cloud, path: str) -> dict[str, str]:
    """Names and types of a table's columns, by the types' names in GoogleSQL."""
    schema = cloud.clients.bigquery.get_table(path).schema
    return {column.name: standard_type(column) for column in schema}


def assert_numbers(actual: Sequence[float], expected: Any) -> None:
    # Sums over a chunk may be added up in another order than over the table.
    np.testing.assert_allclose(actual, np.asarray(expected, dtype=float), rtol=1e-12, atol=1e-14)


def assert_as_in_the_notebook(
    cloud: Cloud,
    output: str,
    model: Any,
    data: pa.Table,
    frame: Any,
    *,
    target: Sequence[str] = ("Prediction",),
    key: str = "id",
    rows: list[dict[str, Any]] | None = None,
) -> None:
    """Predictions and probabilities of each row are what the model itself says of it."""
    column = partial(in_order_of, data, cloud.rows(output) if rows is None else rows, key=key)
    answers = np.asarray(model.predict(frame)).reshape(data.num_rows, -1)
    assert answers.shape[1] == len(target)
    for name, answer in zip(target, answers.T, strict=True):
        if answer.dtype.kind == "f":
            assert_numbers(column(name), answer)
        else:
            assert column(name) == answer.tolist()
    told = [name for name in cloud.columns(output) if name.startswith("PredictionProbability")]
    if not hasattr(model, "predict_proba"):
        assert told == []
    elif len(model.classes_) == 2:
        assert told == ["PredictionProbability"]
        assert_numbers(column(told[0]), model.predict_proba(frame)[:, 1])
    else:
        assert told == [f"PredictionProbability_{label}" for label in model.classes_]
        for name, probability in zip(told, model.predict_proba(frame).T, strict=True):
            assert_numbers(column(name), probability)


# Titanic

PASSENGER = ["Pclass", "Sex", "Age", "SibSp", "Parch", "Fare", "Embarked"]


def titanic_model(target: str) -> Any:
    train = to_frame(sample("titanic_train"), FrameKind.PANDAS)
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["Age", "Fare", "SibSp", "Parch"]),
        (OneHotEncoder(handle_unknown="ignore"), ["Pclass", "Sex", "Embarked"]),
    )
    y = train["Survived"] == 1
    labels = {
        "integer": y.astype("int64"),
        "boolean": y.astype(bool),
        "words": y.map({True: "alive", False: "dead"}),
        # As it comes from BigQuery: scikit-learn takes its nullable integers for floats.
        "nullable": train["Survived"],
    }
    return make_pipeline(columns, LogisticRegression(max_iter=1000)).fit(
        train[PASSENGER], labels[target]
    )


@pytest.mark.parametrize(
    ("target", "kind"),
    [("integer", "INT64"), ("boolean", "BOOL"), ("words", "STRING"), ("nullable", "FLOAT64")],
)
def test_titanic_with_words_and_nulls(
    service: Client, cloud: Cloud, target: str, kind: str
) -> None:
    passengers = sample("titanic_test")
    assert passengers["Age"].null_count
    assert passengers["Embarked"].null_count == 0
    model = titanic_model(target)

    output = predict(
        service,
        cloud,
        model,
        passengers,
        metadata={"target": "Survived", "id_columns": ["PassengerId"]},
        chunk_rows=50,
    )

    frame = to_frame(passengers, FrameKind.PANDAS)[PASSENGER]
    assert_as_in_the_notebook(
        cloud, output, model, passengers, frame, target=["Survived"], key="PassengerId"
    )
    assert kinds(cloud, output)["Survived"] == kind


def test_words_with_nulls_go_through_an_imputer(service: Client, cloud: Cloud) -> None:
    passengers = sample("titanic_train")
    assert passengers["Embarked"].null_count
    words = make_pipeline(
        SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")
    )
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["Age", "Fare", "SibSp", "Parch"]),
        (words, ["Pclass", "Sex", "Embarked"]),
    )
    frame = to_frame(passengers, FrameKind.PANDAS)
    model = make_pipeline(columns, RandomForestClassifier(20, random_state=0))
    model.fit(frame[PASSENGER], frame["Survived"].astype("int64"))

    output = predict(service, cloud, model, passengers, id_columns=["PassengerId"], chunk_rows=64)

    assert_as_in_the_notebook(cloud, output, model, passengers, frame[PASSENGER], key="PassengerId")


# Kinds of models


@pytest.mark.parametrize(
    ("model", "y", "kind"),
    [
        pytest.param(LogisticRegression(), BINARY, "INT64", id="two integers"),
        pytest.param(LogisticRegression(), BINARY.astype(bool), "BOOL", id="booleans"),
        pytest.param(RandomForestClassifier(7), CLASSES, "STRING", id="three words, a forest"),
        pytest.param(LogisticRegression(), CLASSES, "STRING", id="three words, linear"),
        pytest.param(HistGradientBoostingClassifier(max_iter=5), CLASSES, "STRING", id="boosted"),
        pytest.param(
            HistGradientBoostingClassifier(max_iter=5), BINARY, "INT64", id="two integers, boosted"
        ),
        pytest.param(KNeighborsClassifier(4), BINARY, "INT64", id="neighbours that vote"),
        pytest.param(LinearSVC(), BINARY, "INT64", id="a linear machine"),
        pytest.param(SVC(), CLASSES, "STRING", id="no probabilities"),
        pytest.param(LinearRegression(), AMOUNT, "FLOAT64", id="regression"),
        pytest.param(KMeans(3, random_state=0), None, "INT64", id="clusters"),
        pytest.param(
            IsolationForest(n_estimators=20, random_state=0), None, "INT64", id="outliers"
        ),
        pytest.param(
            make_pipeline(StandardScaler(), Stateless(), LogisticRegression()),
            CLASSES,
            "STRING",
            id="a pipeline",
        ),
        pytest.param(
            GridSearchCV(
                make_pipeline(StandardScaler(), DecisionTreeClassifier(random_state=0)),
                {"decisiontreeclassifier__max_depth": [1, 3]},
            ),
            CLASSES,
            "STRING",
            id="a grid search",
        ),
    ],
)
def test_a_model_answers_each_row_as_in_the_notebook(
    service: Client, cloud: Cloud, model: Any, y: Any, kind: str
) -> None:
    model = model.fit(FRAME, y)

    output = predict(service, cloud, model, NUMBERS, chunk_rows=25)

    assert_as_in_the_notebook(cloud, output, model, NUMBERS, FRAME)
    assert kinds(cloud, output)["Prediction"] == kind


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"target": ["height", "weight"]}, ["height", "weight"]),
        ({}, ["Prediction_0", "Prediction_1"]),
        ({"target": "size"}, ["size_0", "size_1"]),
    ],
)
def test_several_numbers_are_predicted_into_a_column_each(
    service: Client, cloud: Cloud, metadata: dict[str, Any], names: list[str]
) -> None:
    model = LinearRegression().fit(FRAME, TWO_AMOUNTS)

    output = predict(service, cloud, model, NUMBERS, metadata=metadata)

    assert list(cloud.columns(output)) == ["id", *names, *TOLD]
    assert_as_in_the_notebook(cloud, output, model, NUMBERS, FRAME, target=names)


def test_several_classes_are_predicted_with_their_probabilities(
    service: Client, cloud: Cloud
) -> None:
    model = RandomForestClassifier(5, random_state=0).fit(FRAME, np.column_stack([CLASSES, BINARY]))

    output = predict(service, cloud, model, NUMBERS, metadata={"target": ["kind", "sign"]})

    column = partial(in_order_of, NUMBERS, cloud.rows(output))
    assert [column("kind"), column("sign")] == model.predict(FRAME).T.tolist()
    of_kind, of_sign = model.predict_proba(FRAME)
    for word, probability in zip(WORDS, of_kind.T, strict=True):
        assert_numbers(column(f"PredictionProbability_kind_{word}"), probability)
    assert_numbers(column("PredictionProbability_sign"), of_sign[:, 1])


# What a model was fitted on


def test_classes_of_any_script_have_columns_of_their_names(service: Client, cloud: Cloud) -> None:
    classes = np.array(["нет", "возможно", "да"])[np.digitize(FRAME["a"], [-0.5, 0.5])]
    model = LogisticRegression().fit(FRAME, classes)

    output = predict(service, cloud, model, NUMBERS)

    told = [name for name in cloud.columns(output) if name.startswith("PredictionProbability_")]
    assert [name.partition("_")[2] for name in told] == ["возможно", "да", "нет"]
    assert_as_in_the_notebook(cloud, output, model, NUMBERS, FRAME)


def test_a_model_on_a_bare_array_finds_its_features_in_the_metadata(
    service: Client, cloud: Cloud
) -> None:
    features = ["c", "a", "b"]
    array = FRAME[features].to_numpy()
    model = RandomForestClassifier(7, random_state=0).fit(array, CLASSES)
    shuffled = NUMBERS.select(["c", "id", "b", "a"])

    output = predict(service, cloud, model, shuffled, metadata={"features": features})

    assert_as_in_the_notebook(cloud, output, model, NUMBERS, array)


def test_a_model_on_a_bare_array_takes_nulls_for_nan_and_words_as_words(
    service: Client, cloud: Cloud
) -> None:
    data = pa.table(
        {
            "id": range(6),
            "n": pa.array([1, None, 3, 4, None, 6]),
            "flag": pa.array([True, False, None, True, True, False]),
            "amount": pa.array([Decimal("1.5"), None, Decimal(3), None, None, Decimal(-6)]).cast(
                pa.decimal128(38, 9)
            ),
        }
    )
    features = ["n", "flag", "amount"]
    array = to_frame(data.select(features), FrameKind.NUMPY)
    assert np.isnan(array).any(axis=0).all()
    model = make_pipeline(SimpleImputer(), Ridge()).fit(array, np.arange(6.0))

    output = predict(service, cloud, model, data, metadata={"features": features}, chunk_rows=2)

    assert_as_in_the_notebook(cloud, output, model, data, array)


def test_a_model_on_a_polars_frame_gets_polars_frames(service: Client, cloud: Cloud) -> None:
    amounts = [Decimal(each) for each in ("0.5", "1.25", "2", "3.75")]
    data = pa.table(
        {
            "id": range(40),
            "word": pa.array(["a", "bb", None, "cac"] * 10),
            "amount": pa.array([*amounts, None] * 8, pa.decimal128(38, 9)),
        }
    )
    features = ["word", "amount"]
    frame = to_frame(data.select(features), FrameKind.POLARS)
    model = make_pipeline(FunctionTransformer(polars_features), Ridge())
    model.fit(frame, np.arange(40.0) % 7)

    output = predict(
        service,
        cloud,
        model,
        data,
        metadata={"features": features, "frame": "polars"},
        chunk_rows=9,
    )

    assert_as_in_the_notebook(cloud, output, model, data, frame)


def test_columns_may_stand_in_another_order_in_the_table(service: Client, cloud: Cloud) -> None:
    model = LinearRegression().fit(FRAME, AMOUNT)

    output = predict(service, cloud, model, NUMBERS.select(["c", "b", "id", "a"]))

    assert_as_in_the_notebook(cloud, output, model, NUMBERS, FRAME)


# Types of features


def test_a_whole_number_stays_one_in_chunks_with_and_without_nulls(
    service: Client, cloud: Cloud
) -> None:
    # Nulls in the first rows and in the last: most chunks of four have none.
    n = [None, 5, None, 7, *range(4, 24), 24, None]
    data = pa.table({"id": range(26), "n": pa.array(n), "x": np.linspace(0, 1, 26)})
    frame = to_frame(data.select(["n", "x"]), FrameKind.PANDAS)
    # The first step raises where a whole number is anything but Int64.
    model = make_pipeline(
        FunctionTransformer(checked_nullable, feature_names_out="one-to-one"),
        HistGradientBoostingRegressor(min_samples_leaf=2, max_iter=10),
    ).fit(frame, np.arange(26) % 5)

    output = predict(
        service,
        cloud,
        model,
        data,
        metadata={"features": ["n", "x"], "frame": "pandas"},
        chunk_rows=4,
    )

    assert_as_in_the_notebook(cloud, output, model, data, frame)


def test_whole_numbers_with_nulls_may_be_imputed(service: Client, cloud: Cloud) -> None:
    n = pa.array([None if number % 20 == 0 else number for number in range(60)])
    data = NUMBERS.append_column("n", n)
    frame = to_frame(data.select(["n", "a"]), FrameKind.PANDAS)
    impute = SimpleImputer(strategy="constant", fill_value=-1)
    model = make_pipeline(impute, LinearRegression()).fit(frame, AMOUNT)

    output = predict(service, cloud, model, data, chunk_rows=7)

    assert_as_in_the_notebook(cloud, output, model, data, frame)


def test_amounts_dates_and_moments_are_taken_apart_as_in_the_notebook(
    service: Client, cloud: Cloud
) -> None:
    rows = 12
    moment = dt.datetime(2024, 2, 28, 21, 59, 58, 123456, tzinfo=dt.UTC)
    data = pa.table(
        {
            "id": range(rows),
            "price": pa.array(
                [None if n == 3 else Decimal(f"{n}.000000001") for n in range(rows)],
                pa.decimal128(38, 9),
            ),
            "born": pa.array(
                [None if n == 5 else dt.date(1900 + 11 * n, 1 + n, 28) for n in range(rows)]
            ),
            "seen": pa.array(
                [
                    None if n == 7 else moment + n * dt.timedelta(hours=1, microseconds=n)
                    for n in range(rows)
                ],
                pa.timestamp("us", "UTC"),
            ),
        }
    )
    features = ["price", "born", "seen"]
    frame = to_frame(data.select(features), FrameKind.PANDAS)
    model = make_pipeline(
        FunctionTransformer(dates_taken_apart),
        SimpleImputer(),
        DecisionTreeRegressor(random_state=0),
    ).fit(frame, np.arange(float(rows)))

    output = predict(
        service,
        cloud,
        model,
        data,
        metadata={"features": features, "frame": "pandas"},
        chunk_rows=5,
    )

    assert_as_in_the_notebook(cloud, output, model, data, frame)
    assert in_order_of(data, cloud.rows(output), "Prediction") == list(range(rows))


def test_a_boolean_may_be_a_feature_and_may_be_null(service: Client, cloud: Cloud) -> None:
    flags = [True, False, None, True, False, None, False, True] * 5
    data = pa.table({"id": range(40), "flag": pa.array(flags), "x": np.arange(40.0) % 3})
    frame = to_frame(data.select(["flag", "x"]), FrameKind.PANDAS)
    model = HistGradientBoostingClassifier(min_samples_leaf=2, max_iter=10)
    model.fit(frame, [str(each) for each in flags])

    output = predict(service, cloud, model, data, chunk_rows=1)

    assert_as_in_the_notebook(cloud, output, model, data, frame)
    assert in_order_of(data, cloud.rows(output), "Prediction") == [str(each) for each in flags]


def test_booleans_without_nulls_may_be_features(service: Client, cloud: Cloud) -> None:
    data = NUMBERS.append_column("flag", pa.array([number % 3 == 0 for number in range(60)]))
    frame = to_frame(data.select(["flag", "a"]), FrameKind.PANDAS)
    model = LogisticRegression().fit(frame, BINARY)

    output = predict(service, cloud, model, data, chunk_rows=25)

    assert_as_in_the_notebook(cloud, output, model, data, frame)


def test_an_array_may_be_a_feature(service: Client, cloud: Cloud) -> None:
    lists = [list(range(n % 4)) for n in range(20)]
    data = pa.table({"id": range(20), "items": pa.array(lists, pa.list_(pa.int64()))})
    frame = to_frame(data.select(["items"]), FrameKind.PANDAS)
    model = make_pipeline(FunctionTransformer(lengths_of_lists), LinearRegression())
    model.fit(frame, [10.0 * len(each) for each in lists])

    output = predict(
        service,
        cloud,
        model,
        data,
        metadata={"features": ["items"], "frame": "pandas"},
        chunk_rows=6,
    )

    assert_as_in_the_notebook(cloud, output, model, data, frame)


def test_of_a_wide_table_the_few_columns_that_are_needed_are_found(
    service: Client, cloud: Cloud
) -> None:
    random = np.random.default_rng(1)
    wide = {f"c{number:03}": random.normal(size=30) for number in range(300)}
    data = pa.table({"id": range(30)} | wide)
    features = [f"c{number:03}" for number in range(295, 15, -29)]
    assert len(features) == 10
    frame = to_frame(data.select(features), FrameKind.PANDAS)
    model = LinearRegression().fit(frame, frame.sum(axis=1))

    output = predict(service, cloud, model, data, id_columns=["id"])

    assert list(cloud.columns(output)) == ["id", "Prediction", *TOLD]
    assert_as_in_the_notebook(cloud, output, model, data, frame)


# Few rows, many rows, some rows

MODEL = LogisticRegression().fit(FRAME, CLASSES)
MODEL_COLUMNS = ["Prediction", *(f"PredictionProbability_{word}" for word in WORDS)]


def test_a_table_without_rows_makes_an_output_table_without_rows(
    service: Client, cloud: Cloud
) -> None:
    data = NUMBERS.slice(0, 0)

    output = predict(service, cloud, MODEL, data)

    assert cloud.count(output) == 0
    assert kinds(cloud, output) == {
        "id": "INT64",
        "Prediction": "STRING",
        **dict.fromkeys(MODEL_COLUMNS[1:], "FLOAT64"),
        "PredictionTimestamp": "TIMESTAMP",
        "ModelName": "STRING",
        "ModelVersion": "STRING",
    }


def test_a_table_of_one_row_is_predicted(service: Client, cloud: Cloud) -> None:
    data = NUMBERS.slice(41, 1)

    output = predict(service, cloud, MODEL, data)

    assert_as_in_the_notebook(cloud, output, MODEL, data, FRAME.iloc[41:42])


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("a > 0.5", FRAME["a"] > 0.5),
        ("a > 0.5 AND id < 30", (FRAME["a"] > 0.5) & (np.array(NUMBERS["id"]) < 30)),
        ("a > 1000", FRAME["a"] > 1000),
    ],
)
def test_a_filter_leaves_the_rows_it_says(
    service: Client, cloud: Cloud, where: str, kept: Any
) -> None:
    chosen = NUMBERS.filter(pa.array(kept))

    output = predict(service, cloud, MODEL, cloud.put(NUMBERS), rows=len(chosen), where=where)

    if len(chosen):
        assert_as_in_the_notebook(cloud, output, MODEL, chosen, FRAME[kept])
    assert cloud.count(output) == len(chosen)


def test_a_filter_may_name_a_column_that_is_not_read(service: Client, cloud: Cloud) -> None:
    data = NUMBERS.append_column("part", pa.array(["x", "y", "z"] * 20))
    kept = np.array(["x", "y", "z"] * 20) == "y"

    output = predict(
        service, cloud, MODEL, cloud.put(data), rows=20, where="part = 'y'", id_columns=["id"]
    )

    assert "part" not in cloud.columns(output)
    assert_as_in_the_notebook(cloud, output, MODEL, data.filter(pa.array(kept)), FRAME[kept])


def test_chunks_of_any_size_give_the_same_result(service: Client, cloud: Cloud) -> None:
    source = cloud.put(NUMBERS)
    results = []
    for chunks in ({}, {"chunk_rows": 1}, {"chunk_rows": 7}, {"chunk_rows": 60}):
        output = predict(service, cloud, MODEL, source, rows=60, **chunks)
        rows = sorted(by_id(cloud.rows(output)).items())
        results.append([[row[name] for name in ["id", *MODEL_COLUMNS]] for _, row in rows])

    for result in results[1:]:
        for row, expected in zip(result, results[0], strict=True):
            assert row[:2] == expected[:2]
            assert_numbers(row[2:], expected[2:])


def test_a_table_of_several_read_streams_has_every_id_once(service: Client, cloud: Cloud) -> None:
    data = numbers(60_000, seed=3)
    source = cloud.put(data)
    session = cloud.portal.call(
        partial(
            open_session,
            cloud.clients.storage,
            TableRef.parse(source),
            project=TableRef.parse(source).project,
            max_streams=cloud.settings.read_streams,
        )
    )
    assert len(session.streams) > 1
    frame = to_frame(data.select(FEATURES), FrameKind.PANDAS)

    output = predict(service, cloud, MODEL, source, rows=60_000, chunk_rows=5000)

    # Once each, and each with its own prediction.
    [counts] = cloud.query(f"SELECT COUNT(*) AS n, COUNT(DISTINCT id) AS ids FROM `{output}`")
    assert (counts["n"], counts["ids"]) == (60_000, 60_000)
    rows = bq_get(output, "arrow", settings=cloud.settings).to_pylist()
    assert_as_in_the_notebook(cloud, output, MODEL, data, frame, rows=rows)


# The columns of the output


@pytest.mark.parametrize(
    ("metadata", "request_ids", "expected"),
    [
        pytest.param({}, None, ["id", "note", "when"], id="all that are no features"),
        pytest.param({"id_columns": ["when", "id"]}, None, ["when", "id"], id="of the metadata"),
        pytest.param({"id_columns": ["when"]}, ["note", "id"], ["note", "id"], id="of the request"),
        pytest.param({}, ["id"], ["id"], id="one"),
        pytest.param({}, ["b", "id", "a"], ["b", "id", "a"], id="features too"),
    ],
)
def test_the_output_has_its_columns_in_this_order(
    service: Client,
    cloud: Cloud,
    metadata: dict[str, Any],
    request_ids: list[str] | None,
    expected: list[str],
) -> None:
    days = pa.array([dt.date(2024, 1, 1)] * 60)
    data = NUMBERS.append_column("note", pa.array(["x"] * 60)).append_column("when", days)
    more = {} if request_ids is None else {"id_columns": request_ids}

    output = predict(service, cloud, MODEL, data, metadata={"target": "kind", **metadata}, **more)

    assert list(cloud.columns(output)) == [*expected, "kind", *MODEL_COLUMNS[1:], *TOLD]
    if "id" in expected:
        assert_as_in_the_notebook(cloud, output, MODEL, data, FRAME, target=["kind"])


def test_a_feature_that_is_an_id_column_too_comes_out_as_it_went_in(
    service: Client, cloud: Cloud
) -> None:
    output = predict(service, cloud, MODEL, NUMBERS, id_columns=["id", "c"])

    assert in_order_of(NUMBERS, cloud.rows(output), "c") == NUMBERS["c"].to_pylist()
    assert_as_in_the_notebook(cloud, output, MODEL, NUMBERS, FRAME)


def test_a_feature_may_be_the_only_id_column(service: Client, cloud: Cloud) -> None:
    data = numbers(20).set_column(1, "a", pa.array(np.arange(20.0)))
    frame = to_frame(data.select(FEATURES), FrameKind.PANDAS)

    output = predict(service, cloud, MODEL, data, id_columns=["a"])

    assert_as_in_the_notebook(cloud, output, MODEL, data, frame, key="a")


ID_TYPES: dict[str, tuple[pa.DataType, list[Any]]] = {
    "STRING": (pa.string(), ["", "Ünïcode ✓", None]),
    "BYTES": (pa.binary(), [b"", b"\x00\xff", None]),
    "FLOAT64": (pa.float64(), [0.1, -1e300, None]),
    "BOOL": (pa.bool_(), [True, False, None]),
    "DATE": (pa.date32(), [dt.date(1, 1, 1), dt.date(9999, 12, 31), None]),
    "DATETIME": (pa.timestamp("us"), [dt.datetime(1969, 7, 20, 20, 17, 40, 1), None, None]),
    "TIME": (pa.time64("us"), [dt.time(23, 59, 59, 999999), dt.time(), None]),
    "TIMESTAMP": (
        pa.timestamp("us", "UTC"),
        [dt.datetime(2024, 2, 29, 12, 0, 0, 1, tzinfo=dt.UTC), None, None],
    ),
    "NUMERIC": (
        pa.decimal128(38, 9),
        [Decimal("12345678901234567890.123456789"), Decimal("-0.000000001"), None],
    ),
}


def test_id_columns_of_every_type_come_out_unchanged_in_name_and_type(
    service: Client, cloud: Cloud
) -> None:
    types = {f"its {name}": each for name, each in ID_TYPES.items()}
    carried = {name.replace(" ", "_"): pa.array(v, k) for name, (k, v) in types.items()}
    lists = pa.array([[1, 2, 2**62], [], [3]], pa.list_(pa.int64()))
    words = pa.array([["x", ""], [], ["y"]], pa.list_(pa.string()))
    data = pa.table(
        {"id": [1, 2, 3]}
        | carried
        | {
            "its_list": lists,
            "its_words": words,
            "a": [0.1, 0.2, 0.3],
            "b": [0.0] * 3,
            "c": [1.0] * 3,
        }
    )
    source = cloud.put(data)
    ids = [name for name in data.column_names if name not in FEATURES]

    output = predict(service, cloud, MODEL, source, rows=3, chunk_rows=2)

    before, after = kinds(cloud, source), kinds(cloud, output)
    assert [*before.items()][: len(ids)] == [*after.items()][: len(ids)]
    assert [*before.values()][1 : len(ids)] == [*ID_TYPES, "ARRAY<INT64>", "ARRAY<STRING>"]
    # The same client reads both, so that what it makes of a value is the same.
    was, is_now = by_id(cloud.rows(source)), by_id(cloud.rows(output))
    for key in (1, 2, 3):
        assert {name: is_now[key][name] for name in ids} == {name: was[key][name] for name in ids}
    assert is_now[1]["its_list"] == [1, 2, 2**62]
    assert is_now[1]["its_NUMERIC"] == Decimal("12345678901234567890.123456789")


def test_every_row_says_when_and_by_which_model(service: Client, cloud: Cloud) -> None:
    name = cloud.publish(MODEL, version="v7")
    output = cloud.new_table("scored")
    before = dt.datetime.now(dt.UTC)

    result = service.predict(cloud.put(NUMBERS), output, name, chunk_rows=7).json()

    rows = cloud.rows(output)
    assert {(row["ModelName"], row["ModelVersion"]) for row in rows} == {(name, "v7")}
    [moment] = {row["PredictionTimestamp"] for row in rows}
    assert before <= moment <= dt.datetime.now(dt.UTC)
    assert (result["model"]["name"], result["model"]["version"]) == (name, "v7")


# Runs and versions


def test_a_second_run_is_appended_to_the_first(service: Client, cloud: Cloud) -> None:
    first, second = NUMBERS.slice(0, 20), NUMBERS.slice(20)
    output = predict(service, cloud, MODEL, first)

    predict(service, cloud, MODEL, second, output=output)

    assert_as_in_the_notebook(cloud, output, MODEL, NUMBERS, FRAME)
    moments = {row["PredictionTimestamp"] for row in cloud.rows(output)}
    names = {row["ModelName"] for row in cloud.rows(output)}
    assert len(moments) == len(names) == 2


def test_the_same_rows_may_be_predicted_twice_and_are_then_there_twice(
    service: Client, cloud: Cloud
) -> None:
    source, name, output = cloud.put(NUMBERS), cloud.publish(MODEL), cloud.new_table()

    for _ in range(2):
        assert service.predict(source, output, name).json()["rows"] == 60

    assert cloud.count(output) == 120
    assert len({row["PredictionTimestamp"] for row in cloud.rows(output)}) == 2


def test_latest_is_the_highest_version_and_not_the_last_in_the_alphabet(
    service: Client, cloud: Cloud
) -> None:
    name = cloud.name("model").replace("_", "-")
    for number in (10, 9, 2):
        # Each version answers its own number.
        constant = LinearRegression().fit(FRAME, np.full(60, float(number)))
        cloud.publish(constant, name, version=f"v{number}")
    source, output, older = cloud.put(NUMBERS), cloud.new_table(), cloud.new_table()

    latest = service.predict(source, output, name, model_version="latest").json()
    service.predict(source, older, name, model_version="v9")

    assert latest["model"]["version"] == "v10"
    assert {row["ModelVersion"] for row in cloud.rows(output)} == {"v10"}
    assert_numbers([row["Prediction"] for row in cloud.rows(output)], np.full(60, 10))
    assert_numbers([row["Prediction"] for row in cloud.rows(older)], np.full(60, 9))


def test_an_output_table_takes_the_columns_by_name_in_whatever_order_it_has_them(
    service: Client, cloud: Cloud
) -> None:
    model = LinearRegression().fit(FRAME, AMOUNT)
    mine = {
        "ModelVersion": pa.string(),
        "Prediction": pa.float64(),
        "Note": pa.string(),
        "ModelName": pa.string(),
        "id": pa.int64(),
        "PredictionTimestamp": pa.timestamp("us", "UTC"),
    }
    output = cloud.put(pa.schema(mine).empty_table())

    predict(service, cloud, model, NUMBERS, output=output)

    assert list(cloud.columns(output)) == list(mine)
    assert_as_in_the_notebook(cloud, output, model, NUMBERS, FRAME)
    assert {row["Note"] for row in cloud.rows(output)} == {None}
    assert {row["ModelVersion"] for row in cloud.rows(output)} == {"v1"}


def test_columns_that_are_required_in_the_input_may_be_ids_and_features(
    service: Client, cloud: Cloud
) -> None:
    source = cloud.new_table()
    cloud.query(
        f"CREATE TABLE `{source}` (id INT64 NOT NULL, a FLOAT64 NOT NULL, b FLOAT64, c FLOAT64)"
    )
    cloud.put(NUMBERS, source)
    [required, *_] = cloud.clients.bigquery.get_table(source).schema
    assert required.mode == "REQUIRED"

    output = predict(service, cloud, MODEL, source, rows=60)

    assert_as_in_the_notebook(cloud, output, MODEL, NUMBERS, FRAME)
