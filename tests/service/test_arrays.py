"""Predictions on arrays: to the last bit those on the frame that the array stands for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from google.cloud.bigquery import SchemaField
from sklearn.compose import make_column_transformer
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    ElasticNet,
    ElasticNetCV,
    Lasso,
    LassoCV,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeClassifier,
    RidgeCV,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, RobustScaler, StandardScaler
from sklearn.utils import check_array

from mlsys.frame import FrameKind, by_columns, to_frame
from mlsys.tables import bigquery_column
from service import arrays
from service.arrays import class_path, on_arrays, plain_numbers
from service.predict import Predictor, describe

ROWS = 3000
LARGE = 2**53
REGRESSORS = {
    "linear": LinearRegression(),
    "ridge": Ridge(),
    "ridge, cross-validated": RidgeCV(),
    "lasso": Lasso(0.01),
    "lasso, cross-validated": LassoCV(cv=2),
    "elastic net": ElasticNet(0.01),
    "elastic net, cross-validated": ElasticNetCV(cv=2),
    "gradient descent": SGDRegressor(random_state=0),
    "scaled": make_pipeline(StandardScaler(), LinearRegression()),
    "scaled twice": make_pipeline(MinMaxScaler(), RobustScaler(), Ridge()),
}
CLASSIFIERS = {
    "logistic": make_pipeline(StandardScaler(), LogisticRegression()),
    "logistic, by itself": LogisticRegression(max_iter=5000),
    "logistic, cross-validated": make_pipeline(
        StandardScaler(), LogisticRegressionCV(cv=2, use_legacy_attributes=False, l1_ratios=(0,))
    ),
    "ridge classifier": RidgeClassifier(),
    "gradient descent classifier": make_pipeline(StandardScaler(), SGDClassifier(random_state=0)),
    "boosting of three classes": HistGradientBoostingClassifier(max_iter=5),
}
WITH_NULLS = {
    "boosting": HistGradientBoostingRegressor(max_iter=5),
    "boosting of classes": HistGradientBoostingClassifier(max_iter=5),
    "imputed": make_pipeline(SimpleImputer(strategy="median"), LinearRegression()),
    "imputed by the most frequent": make_pipeline(
        SimpleImputer(strategy="most_frequent", add_indicator=True), StandardScaler(), Ridge()
    ),
}


def made_up(*, nulls: bool = False, batches: int = 3) -> pa.Table:
    """Rows of floats, integers beyond what a float can hold and booleans, in several batches."""
    draw = np.random.default_rng(7)
    columns = {
        "f": draw.normal(size=ROWS),
        "g": draw.normal(size=ROWS) * 1e6,
        "i": draw.integers(-5, 5, size=ROWS),
        "j": draw.integers(LARGE, LARGE + 1000, size=ROWS),
        "b": draw.random(ROWS) < 0.3,
    }
    missing = {name: (draw.random(ROWS) < 0.1) & nulls for name in columns}
    table = pa.table({n: pa.array(v, mask=missing[n]) for n, v in columns.items()})
    return pa.Table.from_batches(table.to_batches(max_chunksize=ROWS // batches))


def target(rows: pa.Table, classes: int = 0) -> np.ndarray:
    values = np.nan_to_num(by_columns(rows.select(["f", "i"]))).sum(axis=1)
    return np.digitize(values, np.linspace(-3, 3, classes - 1)) if classes else values


def fitted(model: Any, rows: pa.Table, classes: int = 0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(to_frame(rows, FrameKind.PANDAS), target(rows, classes))


def described(model: Any, rows: pa.Table) -> Predictor:
    features: list[SchemaField] = [bigquery_column(field) for field in rows.schema]
    return describe(model, frame=FrameKind.PANDAS, features=features, target=[])


def assert_the_same_as_on_frames(model: Any, rows: pa.Table) -> None:
    assert on_arrays(model) is not None
    predictor, frames = described(model, rows), to_frame(rows, FrameKind.PANDAS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels, *probabilities = (array.to_numpy() for array in predictor(rows))
    np.testing.assert_array_equal(labels, model.predict(frames))
    if probabilities:
        expected = model.predict_proba(frames).T
        np.testing.assert_array_equal(
            probabilities, expected if len(expected) > 2 else expected[1:]
        )


@pytest.mark.parametrize("name", REGRESSORS)
def test_values_are_those_on_frames_to_the_last_bit(name: str) -> None:
    rows = made_up()
    assert_the_same_as_on_frames(fitted(REGRESSORS[name], rows), rows)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes_and_probabilities_are_those_on_frames_to_the_last_bit(
    name: str, classes: int
) -> None:
    rows = made_up()
    assert_the_same_as_on_frames(fitted(CLASSIFIERS[name], rows, classes), rows)


@pytest.mark.parametrize("name", WITH_NULLS)
def test_nulls_are_what_they_are_in_frames(name: str) -> None:
    rows = made_up(nulls=True)
    assert_the_same_as_on_frames(fitted(WITH_NULLS[name], rows, 2), rows)


def test_every_class_that_is_known_is_one_of_those_tested() -> None:
    tested = {
        class_path(step)
        for model in [*REGRESSORS.values(), *CLASSIFIERS.values(), *WITH_NULLS.values()]
        for step in ([s for _, s in model.steps] if isinstance(model, Pipeline) else [model])
    }
    assert tested == arrays._ESTIMATORS | arrays._TRANSFORMERS


@pytest.mark.parametrize("kinds", [["f", "g"], ["i", "j"], ["b"], ["i", "b"], ["f"]])
@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize("batches", [1, 4])
def test_the_array_is_the_one_that_scikit_learn_makes_of_the_frame(
    kinds: list[str], nulls: bool, batches: int
) -> None:
    rows = made_up(nulls=nulls, batches=batches).select(kinds)

    array = by_columns(rows)

    expected = check_array(
        to_frame(rows, FrameKind.PANDAS), ensure_all_finite=False, dtype=[np.float64]
    )
    assert array.dtype == expected.dtype == np.float64
    assert array.flags.f_contiguous
    np.testing.assert_array_equal(array, expected)


class Own(LinearRegression):
    """A subclass may look at the frame."""


def by_dtype() -> Any:
    frame = to_frame(made_up().select(["f", "i"]), FrameKind.PANDAS)
    frame["i"] = pd.Categorical(frame["i"])
    return HistGradientBoostingRegressor(max_iter=2).fit(frame, frame["f"])


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: fitted(Own(), rows),
        lambda rows: fitted(DummyRegressor(), rows),
        lambda rows: fitted(RandomForestClassifier(2), rows, 2),
        lambda rows: fitted(make_pipeline(StandardScaler(), RandomForestClassifier(2)), rows, 2),
        lambda rows: fitted(
            make_pipeline(
                make_column_transformer((OneHotEncoder(), ["i"]), remainder="passthrough"),
                LinearRegression(),
            ),
            rows,
        ),
        lambda rows: fitted(
            make_pipeline(StandardScaler(), LinearRegression()).set_output(transform="pandas"), rows
        ),
        lambda rows: by_dtype(),
        lambda rows: None,
    ],
)
def test_what_may_look_at_the_frame_gets_the_frame(make: Callable[[pa.Table], Any]) -> None:
    assert on_arrays(make(made_up())) is None


def test_columns_that_are_no_plain_numbers_go_in_a_frame() -> None:
    assert plain_numbers(made_up().schema)
    for kind in (pa.string(), pa.decimal128(38, 9), pa.date32(), pa.list_(pa.int64())):
        assert not plain_numbers(pa.schema([("f", pa.float64()), ("other", kind)]))


def test_a_model_keeps_its_names_and_shares_what_it_learned() -> None:
    rows = made_up()
    model = fitted(make_pipeline(StandardScaler(), LinearRegression()), rows)

    bare = on_arrays(model)

    assert list(model.feature_names_in_) == rows.column_names
    assert bare[-1].coef_ is model[-1].coef_
    assert not hasattr(bare[0], "feature_names_in_")


def test_a_row_that_the_model_refuses_is_refused_as_in_a_frame() -> None:
    model = fitted(LinearRegression(), made_up())
    predictor, rows = described(model, made_up()), made_up(nulls=True)
    with pytest.raises(ValueError, match="contains NaN") as on_frame:
        model.predict(to_frame(rows, FrameKind.PANDAS))

    with pytest.raises(ValueError, match="contains NaN") as on_array:
        predictor(rows)

    assert str(on_array.value) == str(on_frame.value)
