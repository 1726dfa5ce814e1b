"""A model's answers, as the output table has them: the labels and probabilities of the notebook."""

from __future__ import annotations

import datetime as dt
import math
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from google.cloud.bigquery import SchemaField
from scipy import sparse
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClusterMixin,
    OutlierMixin,
    RegressorMixin,
)
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import DBSCAN, KMeans
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    BaggingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
)
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import all_estimators

from mlsys.errors import ModelRaised, ModelUnusable
from mlsys.frame import FrameKind, to_frame
from mlsys.names import TableRef
from mlsys.tables import BIGQUERY_TO_ARROW, TableInfo, bigquery_column
from mlsys.tasks import task_group
from service.contract import PredictRequest
from service.plan import (
    Columns,
    Feature,
    ModelNeeds,
    Plan,
    make_plan,
    output_schema,
    result_columns,
)
from service.predict import (
    Predict,
    Predicted,
    Predictor,
    Work,
    describe,
    in_threads,
    predict_stream,
)
from service.sizing import ChunkSize, Cost
from service.source import Source
from tests.service.estimators import (
    Answers,
    CountingLogistic,
    CountingTree,
    CountsTransforms,
    Refuses,
    Stateless,
    calls,
)

PATIENCE = 20
LOGISTIC = LogisticRegression()
STUMP = DecisionTreeClassifier(max_depth=1)
PATH = "/srv/models/hidden/words.txt"


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    calls.clear()


def columns_of(rows: pa.Table) -> list[SchemaField]:
    return [bigquery_column(field) for field in rows.schema]


def described(
    model: Any,
    rows: pa.Table,
    *,
    frame: FrameKind = FrameKind.PANDAS,
    target: Sequence[str] = (),
) -> Predictor:
    return describe(model, frame=frame, features=columns_of(rows), target=target)


def outputs(predictor: Predictor) -> dict[str, str]:
    """Names and BigQuery types of the columns that it makes."""
    fields = [bigquery_column(pa.field(each.name, each.type)) for each in predictor.outputs]
    return {field.name: field.field_type for field in fields}


def grid(repeats: int = 6) -> pa.Table:
    """Nine rows of two features, again and again."""
    pairs = [(float(a), float(b)) for a in range(3) for b in range(3)] * repeats
    return pa.table({"a": [a for a, _ in pairs], "b": [b for _, b in pairs]})


def tied_labels(classes: Sequence[Any], repeats: int = 6) -> np.ndarray:
    """Labels of `grid`: rows 3 to 5 have each class equally often, so that they tie."""
    last = len(classes) - 1
    certain = {0: 0, 1: 0, 2: last // 2, 6: last, 7: last, 8: last}
    kinds = [
        certain.get(row, repeat % len(classes)) for repeat in range(repeats) for row in range(9)
    ]
    return np.array([classes[kind] for kind in kinds], dtype=object)


WORDS = ["yes", "no", "unsure"]
ROWS = grid()
FRAME = to_frame(ROWS, FrameKind.PANDAS)
TWO, THREE = tied_labels(WORDS[:2]), tied_labels(WORDS)
SUM = FRAME["a"].to_numpy() + 2 * FRAME["b"].to_numpy()
TWO_TARGETS = np.column_stack([TWO, THREE])
INDICATORS = np.column_stack([TWO == "yes", THREE == "no"]).astype(int)
TIED_ROWS = slice(3, 6)


def fitted(model: Any, y: Any = None, x: Any = FRAME) -> Any:
    """Fits a model; what scikit-learn warns of meanwhile is not looked at here."""
    if "random_state" in getattr(model, "get_params", dict)():
        model.set_params(random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x, y)


# What can't be made without an argument.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ClassifierChain": {"estimator": LOGISTIC},
    "FixedThresholdClassifier": {"estimator": LOGISTIC},
    "MultiOutputClassifier": {"estimator": LOGISTIC},
    "MultiOutputRegressor": {"estimator": Ridge()},
    "OneVsOneClassifier": {"estimator": LOGISTIC},
    "OneVsRestClassifier": {"estimator": LOGISTIC},
    "OutputCodeClassifier": {"estimator": LOGISTIC},
    "RegressorChain": {"estimator": Ridge()},
    "SelfTrainingClassifier": {"estimator": LOGISTIC},
    "StackingClassifier": {"estimators": [("a", LOGISTIC), ("b", STUMP)]},
    "StackingRegressor": {"estimators": [("a", Ridge()), ("b", DecisionTreeRegressor())]},
    "TunedThresholdClassifierCV": {"estimator": LOGISTIC},
    "VotingClassifier": {"estimators": [("a", LOGISTIC), ("b", STUMP)]},
    "VotingRegressor": {"estimators": [("a", Ridge()), ("b", DecisionTreeRegressor())]},
    # Bounds that are too wide for so little data.
    "NuSVC": {"nu": 0.3},
    "CCA": {"n_components": 1},
    "PLSCanonical": {"n_components": 1},
}
SEVERAL_TARGETS_ONLY = {"ClassifierChain", "MultiOutputClassifier"}
TWO_CLASSES_ONLY = {"FixedThresholdClassifier", "TunedThresholdClassifierCV"}
ESTIMATORS = dict(all_estimators())


def estimators(mixin: type) -> dict[str, type]:
    return {name: each for name, each in ESTIMATORS.items() if issubclass(each, mixin)}


CLASSIFIERS = {
    name: each
    for name, each in estimators(ClassifierMixin).items()
    if name not in SEVERAL_TARGETS_ONLY
}
REGRESSORS = estimators(RegressorMixin)
CLUSTERERS = estimators(ClusterMixin)
OUTLIER_DETECTORS = estimators(OutlierMixin)


def make(name: str, kind: type) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**ARGUMENTS.get(name, {}))


def assert_answers_as_the_model(predictor: Predictor, rows: pa.Table = ROWS) -> None:
    """Labels and probabilities are the model's own, value for value and type for type."""
    model = predictor.estimator
    frame = to_frame(rows.select(predictor.features), predictor.frame)
    arrays = predictor(rows)

    assert [array.type for array in arrays] == [output.type for output in predictor.outputs]
    labels, probabilities = arrays[: len(predictor.targets)], arrays[len(predictor.targets) :]
    expected = np.asarray(model.predict(frame)).reshape(rows.num_rows, -1)
    assert [array.to_pylist() for array in labels] == expected.T.tolist()
    if probabilities:
        expected = model.predict_proba(frame)
        if expected.shape[1] == 2:
            expected = expected[:, 1:]
        actual = np.column_stack([array.to_numpy() for array in probabilities])
        np.testing.assert_array_equal(actual, expected)


def assert_classifies_as_the_model(name: str, labels: np.ndarray) -> None:
    model = fitted(make(name, CLASSIFIERS[name]), labels)

    predictor = described(model, ROWS)

    assert outputs(predictor)["Prediction"] == "STRING"
    assert bool(predictor.probabilities) == hasattr(model, "predict_proba")
    assert_answers_as_the_model(predictor)


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_labels_and_probabilities_of_two_tied_classes_are_the_classifiers_own(name: str) -> None:
    assert_classifies_as_the_model(name, TWO)


@pytest.mark.parametrize("name", sorted(CLASSIFIERS.keys() - TWO_CLASSES_ONLY))
def test_labels_and_probabilities_of_three_tied_classes_are_the_classifiers_own(name: str) -> None:
    assert_classifies_as_the_model(name, THREE)


def test_the_rows_do_tie_and_some_classifiers_decide_a_tie_by_themselves() -> None:
    """Or else the two tests above would prove nothing."""
    forest = fitted(DecisionTreeClassifier(), THREE)
    np.testing.assert_array_equal(forest.predict_proba(FRAME)[TIED_ROWS], np.full((3, 3), 1 / 3))
    deciding = []
    for name in (
        "GaussianProcessClassifier",
        "GradientBoostingClassifier",
        "FixedThresholdClassifier",
    ):
        model = fitted(make(name, CLASSIFIERS[name]), TWO)
        most_probable = model.classes_[np.argmax(model.predict_proba(FRAME), axis=1)]
        deciding.append((most_probable != model.predict(FRAME)).any())
    assert any(deciding)


def test_a_support_vector_machine_with_probabilities_keeps_its_own_labels() -> None:
    # Its probabilities come from a cross-validated fit, and may contradict its labels.
    values = np.random.default_rng(0).normal(size=(2, 40))
    rows = pa.table({"a": values[0], "b": values[1]})
    x = to_frame(rows, FrameKind.PANDAS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SVC(probability=True, random_state=0).fit(x, np.arange(40) % 2)
    most_probable = np.argmax(model.predict_proba(x), axis=1)
    assert (most_probable != model.predict(x)).any()

    assert_answers_as_the_model(described(model, rows), rows)


def regression_target(name: str) -> np.ndarray:
    several = name.startswith(("MultiTask", "MultiOutput")) or name == "RegressorChain"
    return np.column_stack([SUM, -SUM]) if several else SUM + 1


@pytest.mark.parametrize("name", sorted(REGRESSORS))
def test_a_regressors_values_are_its_own(name: str) -> None:
    rows = ROWS.select(["a"]) if name == "IsotonicRegression" else ROWS
    x = to_frame(rows, FrameKind.PANDAS)
    model = fitted(make(name, REGRESSORS[name]), regression_target(name), x)

    predictor = described(model, rows)

    assert set(outputs(predictor).values()) == {"FLOAT64"}
    assert not predictor.probabilities
    assert_answers_as_the_model(predictor, rows)


@pytest.mark.parametrize("name", sorted(CLUSTERERS))
def test_a_clusterers_clusters_are_its_own_where_it_can_predict(name: str) -> None:
    model = fitted(make(name, CLUSTERERS[name]))
    if not hasattr(model, "predict"):
        with pytest.raises(ModelUnusable, match=f"{name}, which has no `predict`"):
            described(model, ROWS)
        return

    predictor = described(model, ROWS)

    assert outputs(predictor) == {"Prediction": "INT64"}
    assert_answers_as_the_model(predictor)


@pytest.mark.parametrize("name", sorted(OUTLIER_DETECTORS))
def test_an_outlier_detectors_verdicts_are_its_own(name: str) -> None:
    model = OUTLIER_DETECTORS[name]()
    if name == "LocalOutlierFactor":
        model.set_params(novelty=True)
    # Bare, for some of them refit what they are given without the names of its columns.
    rows = to_frame(ROWS, FrameKind.NUMPY)

    predictor = described(fitted(model, x=rows), ROWS, frame=FrameKind.NUMPY)

    assert outputs(predictor) == {"Prediction": "INT64"}
    assert_answers_as_the_model(predictor)
    assert set(predictor(ROWS)[0].to_pylist()) <= {1, -1}


def test_a_mixture_has_no_classes_and_so_no_probabilities_of_them() -> None:
    predictor = described(fitted(GaussianMixture(2)), ROWS)

    assert outputs(predictor) == {"Prediction": "INT64"}
    assert_answers_as_the_model(predictor)


@pytest.mark.parametrize("frame", FrameKind)
def test_a_model_is_given_the_kind_of_frame_it_was_fitted_on(frame: FrameKind) -> None:
    model = fitted(RandomForestClassifier(5), THREE, to_frame(ROWS, frame))
    seen = []
    model.predict_proba = lambda rows: (seen.append(rows), type(model).predict_proba(model, rows))[
        1
    ]

    described(model, ROWS, frame=frame)(ROWS)

    assert {type(rows) for rows in seen} == {type(to_frame(ROWS, frame))}


def test_a_model_gets_its_features_in_its_order_and_nothing_else() -> None:
    model = fitted(LogisticRegression(), THREE)
    predictor = described(model, ROWS)
    shuffled = ROWS.select(["b", "a"]).append_column("id", pa.array(range(len(ROWS))))

    assert predictor(shuffled) == predictor(ROWS)


# One pass or two


def count_calls(model: Any, chunks: int = 1) -> dict[str, int]:
    predictor = described(model, ROWS)
    assert_answers_as_the_model(predictor)
    calls.clear()
    for _ in range(chunks):
        predictor(ROWS)
    return dict(calls)


def counting_forest() -> RandomForestClassifier:
    forest = fitted(RandomForestClassifier(3), THREE)
    for tree in forest.estimators_:
        tree.__class__ = CountingTree
    return forest


def test_a_forest_is_passed_through_once_a_chunk() -> None:
    assert count_calls(counting_forest(), chunks=2) == {"predict_proba": 2 * 3}


def test_bagged_models_are_passed_through_once_a_chunk() -> None:
    model = fitted(BaggingClassifier(CountingTree(), n_estimators=3), THREE)

    assert count_calls(model) == {"predict_proba": 3}


def test_a_calibrated_model_is_passed_through_once_a_chunk() -> None:
    tree = fitted(CountingTree(max_depth=1), THREE)
    model = fitted(CalibratedClassifierCV(FrozenEstimator(tree), ensemble=False), THREE)

    assert count_calls(model) == {"predict_proba": 1}


@pytest.mark.parametrize(("labels", "passes"), [(TWO, 1), (THREE, 2)], ids=["two", "three"])
def test_boosting_of_two_classes_is_passed_through_once_a_chunk(
    labels: Any, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = described(fitted(HistGradientBoostingClassifier(max_iter=5), labels), ROWS)
    assert_answers_as_the_model(predictor)
    passed, within = [], HistGradientBoostingClassifier._raw_predict
    monkeypatch.setattr(
        HistGradientBoostingClassifier,
        "_raw_predict",
        lambda *given: passed.append(1) or within(*given),
    )

    predictor(ROWS)

    assert len(passed) == passes


def test_a_model_whose_labels_may_differ_is_asked_for_labels_and_for_probabilities() -> None:
    assert count_calls(fitted(CountingLogistic(), THREE)) == {"predict": 1, "predict_proba": 1}


def test_a_subclass_of_a_tree_may_decide_otherwise_and_is_asked_for_its_labels() -> None:
    # Counted twice: a tree's `predict` does not go through `predict_proba`.
    assert count_calls(fitted(CountingTree(), THREE)) == {"predict": 1, "predict_proba": 1}


@pytest.mark.parametrize("last", [RandomForestClassifier(3), LogisticRegression(), LinearSVC()])
def test_the_transformers_of_a_pipeline_run_once_a_chunk(last: Any) -> None:
    steps = [CountsTransforms("first"), StandardScaler(), CountsTransforms("last")]
    model = fitted(make_pipeline(*steps, last), THREE)

    assert count_calls(model, chunks=3) == {"first": 3, "last": 3}


@pytest.mark.parametrize("last", [RandomForestClassifier(3), LogisticRegression()])
@pytest.mark.parametrize("search", [GridSearchCV, RandomizedSearchCV])
def test_searches_and_pipelines_in_pipelines_run_their_transformers_once(
    last: Any, search: Any
) -> None:
    inner = make_pipeline(CountsTransforms("inner"), "passthrough", last)
    searched = make_pipeline(CountsTransforms("searched"), inner)
    grid = {"pipeline__countstransforms__name": ["inner"]}
    more = {"n_iter": 1} if search is RandomizedSearchCV else {}
    model = fitted(
        make_pipeline(CountsTransforms("outer"), search(searched, grid, cv=2, **more)), THREE
    )

    assert count_calls(model) == {"outer": 1, "searched": 1, "inner": 1}


def test_a_pipeline_may_end_its_transformers_in_one_that_learns_nothing() -> None:
    for last in (RandomForestClassifier(3), LogisticRegression()):
        model = fitted(make_pipeline(StandardScaler(), Stateless(), last), THREE)

        assert_answers_as_the_model(described(model, ROWS))


def test_a_pipeline_of_a_model_alone_is_that_model() -> None:
    assert_answers_as_the_model(described(fitted(make_pipeline(LOGISTIC), THREE), ROWS))


# What describe() tells


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([3, -7], "INT64"),
        (np.array([3, 200], dtype=np.uint8), "INT64"),
        ([1.0, 2.0], "FLOAT64"),
        (np.array([1.0, 2.0], dtype=np.float32), "FLOAT64"),
        ([True, False], "BOOL"),
        (["no", "yes"], "STRING"),
        (np.array(["no", "yes"], dtype=object), "STRING"),
    ],
)
@pytest.mark.parametrize("model", [KNeighborsClassifier(), RandomForestClassifier(3), LinearSVC()])
def test_labels_have_the_type_of_the_classes(labels: Any, kind: str, model: Any) -> None:
    rows = np.arange(len(ROWS)) % 2
    predictor = described(fitted(model, np.asarray(labels)[rows]), ROWS)

    assert outputs(predictor)["Prediction"] == kind
    assert_answers_as_the_model(predictor)


def test_columns_of_pandas_make_labels_of_the_type_that_the_classifier_gives_them() -> None:
    for dtype, kind in (("str", "STRING"), ("category", "STRING"), ("bool", "BOOL")):
        y = pd.Series(TWO) == "yes" if dtype == "bool" else pd.Series(TWO).astype(dtype)

        predictor = described(fitted(RandomForestClassifier(3), y), ROWS)

        assert outputs(predictor)["Prediction"] == kind
        assert_answers_as_the_model(predictor)


def test_labels_from_nullable_columns_are_what_the_classifier_makes_of_them() -> None:
    # scikit-learn itself turns pandas' Int64 and boolean into floats.
    for y in (pd.Series(TWO == "yes").astype("Int64"), pd.Series(TWO == "yes").astype("boolean")):
        predictor = described(fitted(LogisticRegression(), y), ROWS)

        assert outputs(predictor) == {"Prediction": "FLOAT64", "PredictionProbability": "FLOAT64"}
        assert_answers_as_the_model(predictor)


def test_two_classes_have_one_probability_that_of_the_second() -> None:
    predictor = described(fitted(LogisticRegression(), TWO), ROWS)

    assert outputs(predictor) == {"Prediction": "STRING", "PredictionProbability": "FLOAT64"}
    assert predictor.classes[0].to_pylist() == ["no", "yes"]


def test_more_classes_have_one_probability_each_in_the_order_of_the_classes() -> None:
    predictor = described(fitted(LogisticRegression(), THREE), ROWS, target=["Answer"])

    assert list(outputs(predictor)) == [
        "Answer",
        "PredictionProbability_no",
        "PredictionProbability_unsure",
        "PredictionProbability_yes",
    ]


def test_a_single_class_has_its_one_probability() -> None:
    predictor = described(fitted(DummyClassifier(), np.full(len(ROWS), "only")), ROWS)

    assert outputs(predictor) == {"Prediction": "STRING", "PredictionProbability_only": "FLOAT64"}
    assert_answers_as_the_model(predictor)


def probability_names(labels: Sequence[Any]) -> list[str]:
    y = np.array(labels)[np.arange(len(ROWS)) % len(labels)]
    predictor = described(fitted(LogisticRegression(), y), ROWS)
    assert_answers_as_the_model(predictor)
    assert predictor.classes[0].to_pylist() == sorted(labels)
    return [each.name.removeprefix("PredictionProbability_") for each in predictor.probabilities]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        ([-1, 0, 1], ["_1", "0", "1"]),
        ([0.0, 1.0, 2.0], ["0", "1", "2"]),
        (["a b", "c/d", "e"], ["a_b", "c_d", "e"]),
        ([2.0, 1234567.0, 1234568.0], ["2", "1234567", "1234568"]),
        (["", "né", "日本"], ["", "né", "日本"]),
        (["да", "может быть", "нет"], ["да", "может_быть", "нет"]),
    ],
)
def test_class_labels_are_cleaned_to_be_parts_of_column_names(
    labels: list[Any], names: list[str]
) -> None:
    assert probability_names(labels) == names


@pytest.mark.parametrize(
    "labels",
    [
        ["a b", "a-b", "a_b"],
        ["a b", "a-b", "a_b_1", "a_b_2"],
        ["Cat", "cAT", "cat"],
        ["-1", "+1", "_1", "1"],
        ["_", "-", " ", "__"],
        ["Type", "Type_2", "type"],
        ["Type", "Type_2", "Type_3", "TYPE", "type"],
    ],
)
def test_class_labels_that_clash_after_cleaning_have_columns_of_their_own(
    labels: list[str],
) -> None:
    names = probability_names(labels)

    assert len({name.casefold() for name in names}) == len(labels)
    assert all(re.fullmatch(r"\w*", name, re.ASCII) for name in names)
    made = [described(fitted(LogisticRegression(), np.array(labels * 18)[: len(ROWS)]), ROWS)]
    assert result_columns([], made[0].outputs)


def test_several_classified_targets_have_labels_and_probabilities_each() -> None:
    for model in (RandomForestClassifier(3), MultiOutputClassifier(LogisticRegression())):
        model = fitted(model, TWO_TARGETS)
        predictor = described(model, ROWS, target=["first", "second"])

        assert outputs(predictor) == {
            "first": "STRING",
            "second": "STRING",
            "PredictionProbability_first": "FLOAT64",
            "PredictionProbability_second_no": "FLOAT64",
            "PredictionProbability_second_unsure": "FLOAT64",
            "PredictionProbability_second_yes": "FLOAT64",
        }
        first, second, *probabilities = predictor(ROWS)
        assert np.column_stack([first, second]).tolist() == model.predict(FRAME).tolist()
        of_first, of_second = model.predict_proba(FRAME)
        np.testing.assert_array_equal(
            np.column_stack(probabilities), np.column_stack([of_first[:, 1:], of_second])
        )


def test_several_targets_without_names_are_numbered() -> None:
    predictor = described(fitted(RandomForestClassifier(3), INDICATORS), ROWS)

    assert list(outputs(predictor)) == [
        "Prediction_0",
        "Prediction_1",
        "PredictionProbability_Prediction_0",
        "PredictionProbability_Prediction_1",
    ]
    one_name = described(predictor.estimator, ROWS, target=["Answer"])
    assert list(outputs(one_name))[:2] == ["Answer_0", "Answer_1"]


@pytest.mark.parametrize(
    "model",
    [
        ClassifierChain(LogisticRegression()),
        OneVsRestClassifier(LogisticRegression()),
        MLPClassifier(max_iter=20),
        make_pipeline(StandardScaler(), ClassifierChain(LogisticRegression())),
    ],
)
def test_probabilities_that_come_as_one_matrix_are_one_for_each_target(model: Any) -> None:
    model = fitted(model, INDICATORS)

    predictor = described(model, ROWS, target=["first", "second"])

    assert outputs(predictor) == {
        "first": "INT64",
        "second": "INT64",
        "PredictionProbability_first": "FLOAT64",
        "PredictionProbability_second": "FLOAT64",
    }
    arrays = predictor(ROWS)
    assert np.column_stack(arrays[:2]).tolist() == model.predict(FRAME).tolist()
    np.testing.assert_array_equal(np.column_stack(arrays[2:]), model.predict_proba(FRAME))


def test_a_sparse_answer_is_an_answer() -> None:
    y = sparse.csr_matrix(INDICATORS)
    model = fitted(OneVsRestClassifier(LogisticRegression()), y)
    assert sparse.issparse(model.predict(FRAME))

    first, second, *_ = described(model, ROWS)(ROWS)

    assert np.column_stack([first, second]).tolist() == model.predict(FRAME).toarray().tolist()


def test_a_classifier_that_refuses_the_sample_row_is_known_by_its_classes() -> None:
    words = pa.table({"w": ["x", "y", "z"] * 18})
    strict = make_pipeline(OneHotEncoder(handle_unknown="error"), LogisticRegression())
    model = fitted(strict, THREE, to_frame(words, FrameKind.PANDAS))

    predictor = described(model, words)

    assert outputs(predictor)["Prediction"] == "STRING"
    assert len(predictor.probabilities) == 3
    assert_answers_as_the_model(predictor, words)


NO_ZEROS = pa.table({"a": [1.0, 2.0, 3.0] * 6, "b": [4.0, 5.0, 6.0] * 6})
NO_ZEROS_FRAME = to_frame(NO_ZEROS, FrameKind.PANDAS)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (Refuses(LinearRegression()), "FLOAT64"),
        (make_pipeline(Refuses(DecisionTreeRegressor())), "FLOAT64"),
        (make_pipeline(OneHotEncoder(handle_unknown="error"), KMeans(2)), "INT64"),
        (make_pipeline(OneHotEncoder(handle_unknown="error"), IsolationForest()), "INT64"),
    ],
)
def test_what_refuses_the_sample_row_is_taken_to_answer_one_number(model: Any, kind: str) -> None:
    model = fitted(model, np.arange(18.0), NO_ZEROS_FRAME)

    predictor = described(model, NO_ZEROS)

    assert outputs(predictor) == {"Prediction": kind}
    assert_answers_as_the_model(predictor, NO_ZEROS)


def test_what_refuses_the_sample_row_answers_as_many_numbers_as_it_has_targets() -> None:
    y = np.arange(36.0).reshape(18, 2)
    model = fitted(Refuses(LinearRegression()), y, NO_ZEROS_FRAME)

    predictor = described(model, NO_ZEROS, target=["u", "v"])

    assert outputs(predictor) == {"u": "FLOAT64", "v": "FLOAT64"}
    assert_answers_as_the_model(predictor, NO_ZEROS)
    with pytest.raises(ValueError, match=r"predict gave 2 columns where 1 are expected.*`target`"):
        described(model, NO_ZEROS)(NO_ZEROS)


def refuses_one_row(rows: pd.DataFrame) -> np.ndarray:
    if len(rows) == 1:
        raise RuntimeError
    return np.ones(len(rows))


def panics_on_one_row(rows: pd.DataFrame) -> np.ndarray:
    if len(rows) == 1:
        raise SystemExit
    return np.ones(len(rows))


@pytest.mark.parametrize("answer", [refuses_one_row, panics_on_one_row])
def test_a_model_of_no_library_may_refuse_the_sample_row(answer: Callable[[Any], Any]) -> None:
    predictor = described(Answers(answer), ROWS)

    assert outputs(predictor) == {"Prediction": "FLOAT64"}
    assert_answers_as_the_model(predictor)


@pytest.mark.parametrize("name", sorted(BIGQUERY_TO_ARROW))
@pytest.mark.parametrize("mode", ["NULLABLE", "REPEATED"])
@pytest.mark.parametrize("frame", FrameKind)
def test_the_sample_row_has_a_value_of_every_type(name: str, mode: str, frame: FrameKind) -> None:
    seen = []

    def answer(rows: Any) -> list[float]:
        seen.append(rows)
        return [1.0]

    feature = SchemaField("x", name, mode=mode)
    describe(Answers(answer), frame=frame, features=[feature], target=())

    [rows] = seen
    kind = BIGQUERY_TO_ARROW[name]
    empty = pa.table({"x": pa.array([], pa.list_(kind) if mode == "REPEATED" else kind)})
    assert len(rows) == 1
    if frame is FrameKind.PANDAS:
        assert rows.dtypes.tolist() == to_frame(empty, frame).dtypes.tolist()
        assert rows["x"].notna().all()
    elif frame is FrameKind.POLARS:
        assert rows.schema == to_frame(empty, frame).schema


@pytest.mark.parametrize(
    ("answer", "kind", "values"),
    [
        (lambda rows: rows["a"].astype("Int64"), "INT64", FRAME["a"].tolist()),
        (lambda rows: rows[["a"]], "FLOAT64", FRAME["a"].tolist()),
        (lambda rows: pl.Series([True] * len(rows)), "BOOL", [True] * 54),
        (lambda rows: pa.array(["x"] * len(rows)), "STRING", ["x"] * 54),
        (
            lambda rows: ["x", "yy", "z"] * (len(rows) // 3) or ["x"],
            "STRING",
            ["x", "yy", "z"] * 18,
        ),
        (lambda rows: np.full(len(rows), 1.5, np.float16), "FLOAT64", [1.5] * 54),
        (lambda rows: np.full((len(rows), 1), 7, np.uint8), "INT64", [7] * 54),
        (lambda rows: np.squeeze(np.full((len(rows), 1), 2.0)), "FLOAT64", [2.0] * 54),
    ],
)
def test_any_object_with_a_predict_will_do(answer: Any, kind: str, values: list[Any]) -> None:
    predictor = described(Answers(answer), ROWS)

    assert outputs(predictor) == {"Prediction": kind}
    assert predictor(ROWS)[0].to_pylist() == values


@pytest.mark.parametrize(
    "model",
    [
        {"coefficients": [1, 2]},
        "a model",
        None,
        fitted(DBSCAN()),
        fitted(PCA()),
        fitted(LocalOutlierFactor()),
        make_pipeline(StandardScaler()).fit(FRAME),
        fitted(GridSearchCV(LOGISTIC, {"C": [1, 2]}, refit=False, cv=2), TWO),
    ],
)
def test_what_has_no_predict_is_no_model(model: Any) -> None:
    with pytest.raises(ModelUnusable, match=f"is a {type(model).__name__}, which has no `predict`"):
        described(model, ROWS)


@pytest.mark.parametrize(
    ("model", "target", "said"),
    [
        (fitted(LinearRegression(), SUM), ["u", "v"], "2 targets, but the model predicts 1"),
        (fitted(LogisticRegression(), TWO), ["u", "v"], "2 targets, but the model predicts 1"),
        (
            fitted(LinearRegression(), np.column_stack([SUM] * 3)),
            ["u", "v"],
            "2 targets, but the model predicts 3",
        ),
        (
            fitted(RandomForestClassifier(2), TWO_TARGETS),
            ["u", "v", "w"],
            "3 targets, but the model predicts 2",
        ),
    ],
)
def test_as_many_targets_have_to_be_named_as_the_model_predicts(
    model: Any, target: list[str], said: str
) -> None:
    with pytest.raises(ModelUnusable, match=said):
        described(model, ROWS, target=target)


@pytest.mark.parametrize(
    "answer",
    [
        lambda rows: None,
        lambda rows: [None] * len(rows),
        lambda rows: [{"label": 1}] * len(rows),
        lambda rows: [Decimal("1.5")] * len(rows),
        lambda rows: np.full(len(rows), "2024-01-01", "datetime64[ns]"),
        lambda rows: np.full(len(rows), 1j),
        lambda rows: [object()] * len(rows),
    ],
)
def test_answers_that_no_column_of_bigquery_takes_are_refused_beforehand(answer: Any) -> None:
    with pytest.raises(ModelUnusable, match="no column of BigQuery takes"):
        described(Answers(answer), ROWS)


# Wrong answers are errors, never a shift


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda rows: np.ones(len(rows) - (len(rows) > 1)), "53 answers for 54 rows"),
        (lambda rows: np.ones(len(rows) + (len(rows) > 1)), "55 answers for 54 rows"),
        (lambda rows: np.ones(1), "1 answers for 54 rows"),
        (lambda rows: 1.0, "1 answers for 54 rows"),
        (lambda rows: [], "0 answers for 54 rows"),
        (lambda rows: np.ones((len(rows), 1 + (len(rows) > 1))), "2 columns where 1 are expected"),
        (lambda rows: np.ones((len(rows), 2, 2)), "3 dimensions"),
    ],
)
def test_an_answer_of_another_shape_than_the_rows_is_an_error(answer: Any, said: str) -> None:
    predictor = described(Answers(answer), ROWS)

    with pytest.raises(ValueError, match=said):
        predictor(ROWS)


class WithProbabilities(BaseEstimator):
    """A classifier of two classes whose probabilities are as a test wants them."""

    def __init__(self, classes: Any, probabilities: Callable[[int], np.ndarray]) -> None:
        self.classes_ = np.array(classes)
        self.probabilities = probabilities

    def predict(self, rows: Any) -> np.ndarray:
        return np.repeat(self.classes_[:1], len(rows))

    def predict_proba(self, rows: Any) -> np.ndarray:
        return self.probabilities(len(rows))


@pytest.mark.parametrize(
    ("classes", "probabilities", "said"),
    [
        ([0.5, 1.5], lambda rows: np.ones((rows, 3)), "2 columns where the classes make 1"),
        ([0.5, 1.5, 2.5], lambda rows: np.ones((rows, 2)), "2 columns where the classes make 3"),
        ([0.5, 1.5, 2.5], lambda rows: np.ones((rows, 4)), "4 columns where the classes make 3"),
        ([0.5, 1.5], lambda rows: np.ones((rows - 1, 2)), "53 answers for 54 rows"),
    ],
)
def test_probabilities_that_do_not_match_the_classes_are_an_error(
    classes: list[float], probabilities: Any, said: str
) -> None:
    predictor = described(WithProbabilities(classes, probabilities), ROWS)

    with pytest.raises(ValueError, match=said):
        predictor(ROWS)


# A stream of batches


def plan_for(
    predictor: Predictor, rows: pa.Table, *, ids: Sequence[str] = (), chunk_rows: int = 1000
) -> Plan:
    by_name = dict(zip(rows.column_names, columns_of(rows), strict=True))
    request = PredictRequest(
        env="dev",
        input_table="my-project.data.input",
        output_table="my-project.data.output",
        model_name="a-model",
        model_version="v3",
        chunk_rows=chunk_rows,
    )
    return make_plan(
        request,
        run_id="run",
        table=TableInfo(TableRef.parse(request.input_table), tuple(by_name.values()), len(rows)),
        output=None,
        columns=Columns(
            features=tuple(by_name[name] for name in predictor.features),
            ids=tuple(by_name[name] for name in ids),
        ),
        needs=ModelNeeds(tuple(map(Feature, predictor.features)), predictor.frame),
        outputs=predictor.outputs,
        model_version="v3",
        chunk_rows=chunk_rows,
        now=dt.datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=dt.UTC),
    )


def sizes_of(plan: Plan) -> ChunkSize:
    return ChunkSize(plan.chunk_rows, most_bytes=2**23)


def predicting(
    predictor: Predictor,
    plan: Plan,
    batches: Sequence[pa.RecordBatch],
    limiter: anyio.CapacityLimiter | None = None,
) -> Predict:
    schema = output_schema(plan, batches[0].schema) if batches else pa.schema([])
    return in_threads(Work(predictor, plan, schema), limiter or anyio.CapacityLimiter(1))


async def stream(
    predictor: Predictor,
    plan: Plan,
    batches: Sequence[pa.RecordBatch],
    *,
    limiter: anyio.CapacityLimiter | None = None,
    number: int = 0,
) -> list[pa.RecordBatch]:
    """Runs the stage on batches that are all there; returns what it sent, or raises."""
    batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    with batches_out, results_out:
        with batches_in:
            for batch in batches:
                batches_in.send_nowait(batch)
        with anyio.fail_after(PATIENCE):
            await predict_stream(
                predicting(predictor, plan, batches, limiter),
                Source(batches_out, number).chunk,
                results_in,
                sizes=sizes_of(plan),
            )
            return [result async for result in results_out]


def predicted(
    model: Any,
    rows: pa.Table,
    *,
    features: Sequence[str] = ("x",),
    batch_rows: int = 10_000,
    number: int = 0,
    **plan: Any,
) -> pa.Table:
    predictor = described(model, rows.select(features))
    settled = plan_for(predictor, rows, **plan)

    async def main() -> list[pa.RecordBatch]:
        return await stream(
            predictor, settled, rows.to_batches(max_chunksize=batch_rows), number=number
        )

    return pa.Table.from_batches(anyio.run(main))


def numbers(rows: int) -> pa.Table:
    return pa.table({"id": pa.array(range(rows)), "x": np.arange(rows) / 2})


DOUBLE = Answers(lambda rows: rows["x"] * 2)


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize("batch_rows", [1, 9, 100])
def test_rows_come_out_once_in_order_and_with_their_ids_whatever_the_chunks(
    chunk_rows: int, batch_rows: int
) -> None:
    rows = numbers(100)

    result = predicted(DOUBLE, rows, ids=["id"], chunk_rows=chunk_rows, batch_rows=batch_rows)

    told = ["PredictionTimestamp", "ModelName", "ModelVersion"]
    assert result.column_names == ["id", "Prediction", *told]
    assert result["id"].to_pylist() == list(range(100))
    assert result["Prediction"].to_pylist() == [float(number) for number in range(100)]
    [moment] = result["PredictionTimestamp"].unique().to_pylist()
    assert moment == dt.datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=dt.UTC)
    assert result["ModelName"].unique().to_pylist() == ["a-model"]
    assert result["ModelVersion"].unique().to_pylist() == ["v3"]


def test_no_rows_in_are_no_rows_out_and_the_model_is_not_asked() -> None:
    predictor = described(DOUBLE, numbers(1).select(["x"]))
    plan = plan_for(predictor, numbers(1))
    asked = Predictor(
        Answers(lambda rows: pytest.fail("asked")), FrameKind.PANDAS, ("x",), predictor.targets
    )

    assert anyio.run(stream, asked, plan, []) == []
    assert anyio.run(stream, asked, plan, numbers(0).to_batches()) == []


class RaisesOn(Answers):
    """Raises on any row whose `x` is one of these, and says what it was given."""

    def __init__(self, *wrong: float, exception: type[BaseException] = ZeroDivisionError) -> None:
        self.wrong = wrong
        self.exception = exception

    def predict(self, rows: Any) -> Any:
        if rows["x"].isin(self.wrong).any():
            raise self.exception(f"can't take {rows['x'].tolist()[:1000]} of {PATH}")
        return rows["x"]


def raised(model: Any, rows: pa.Table, **options: Any) -> ModelRaised:
    with pytest.raises(ModelRaised) as caught:
        predicted(model, rows, **options)
    return caught.value


@pytest.mark.parametrize("row", [0, 1, 499, 500, 70_000, 79_999])
@pytest.mark.parametrize("chunk_rows", [500, 16_384])
def test_the_row_that_a_model_raises_on_is_told_exactly(row: int, chunk_rows: int) -> None:
    error = raised(RaisesOn(row / 2), numbers(80_000), chunk_rows=chunk_rows, number=3)

    assert error.members == {"exception": "ZeroDivisionError", "stream": 3, "row": row}
    assert f"at row {row:,} of read stream 3 " in str(error)
    assert "ZeroDivisionError: can't take" in str(error)


def test_the_row_is_found_without_asking_for_the_others_again_and_again() -> None:
    asked: list[int] = []

    class Counts(RaisesOn):
        def predict(self, rows: Any) -> Any:
            asked.append(len(rows))
            return super().predict(rows)

    error = raised(Counts(16_383 / 2), numbers(16_384), chunk_rows=16_384)

    assert error.members["row"] == 16_383
    assert sum(asked) < 2.1 * 16_384


def test_of_several_such_rows_the_first_is_told() -> None:
    error = raised(RaisesOn(11.5, 12.0, 30.0), numbers(100), chunk_rows=50)

    assert error.members["row"] == 23


def test_every_row_before_the_chunk_that_failed_has_gone_on() -> None:
    rows = numbers(30)
    predictor = described(RaisesOn(12.5), rows.select(["x"]))
    plan = plan_for(predictor, rows, ids=["id"], chunk_rows=10)
    sent: list[int] = []

    async def main() -> None:
        batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        with batches_in, batches_out, results_out:
            batches_in.send_nowait(rows.to_batches()[0])
            with pytest.raises(ModelRaised):
                await predict_stream(
                    predicting(predictor, plan, rows.to_batches()),
                    Source(batches_out).chunk,
                    results_in,
                    sizes=sizes_of(plan),
                )
            # Its end is closed, so that who appends what it sends comes to an end too.
            sent.extend([each async for result in results_out for each in result["id"].to_pylist()])

    anyio.run(main)
    assert sent == list(range(20))


@pytest.mark.parametrize("wrong", [None, 0, 777, 1999])
def test_several_who_predict_one_source_have_every_row_once_and_tell_its_place(
    wrong: int | None,
) -> None:
    rows = numbers(2000)
    predictor = described(RaisesOn(*[] if wrong is None else [wrong / 2]), rows.select(["x"]))
    plan = plan_for(predictor, rows, ids=["id"], chunk_rows=30)

    async def main() -> list[pa.RecordBatch]:
        batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        with batches_out, results_out:
            with batches_in, results_in:
                for batch in rows.to_batches(max_chunksize=70):
                    batches_in.send_nowait(batch)
                next_chunk, sizes = Source(batches_out, 4).chunk, sizes_of(plan)
                predict = predicting(predictor, plan, rows.to_batches(), anyio.CapacityLimiter(3))
                batches_in.close()
                async with task_group() as tasks:
                    for _ in range(3):
                        work = partial(
                            predict_stream, predict, next_chunk, results_in.clone(), sizes=sizes
                        )
                        tasks.start_soon(work)
            return [result async for result in results_out]

    if wrong is not None:
        with pytest.raises(ModelRaised) as caught:
            anyio.run(main)
        assert caught.value.members == {"exception": "ZeroDivisionError", "stream": 4, "row": wrong}
        return
    result = pa.Table.from_batches(anyio.run(main))
    assert sorted(result["id"].to_pylist()) == list(range(2000))
    assert result["Prediction"].to_pylist() == [number / 2 for number in result["id"].to_pylist()]


def test_of_a_chunk_that_is_done_nothing_is_kept_while_the_next_is_predicted() -> None:
    made: list[weakref.ref[pa.RecordBatch]] = []

    async def predict(rows: pa.Table) -> Predicted:
        assert [each for each in made if each() is not None] == []
        [batch] = rows.to_batches()
        made.append(weakref.ref(batch))
        return Predicted([batch], Cost(0.1, 0.1))

    async def main() -> None:
        batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](0)

        async def drop() -> None:
            with suppress(anyio.EndOfStream):
                while True:
                    await results_out.receive()  # Which no name holds.

        with batches_out, results_out:
            with batches_in:
                for _ in range(3):
                    batches_in.send_nowait(numbers(10).to_batches()[0])
            async with task_group() as tasks:
                tasks.start_soon(drop)
                sizes = ChunkSize(10, most_bytes=1)
                await predict_stream(predict, Source(batches_out).chunk, results_in, sizes=sizes)

    anyio.run(main)
    assert len(made) == 3


def test_a_chunk_of_booleans_is_no_larger_than_others_once_a_model_has_it() -> None:
    columns = 50
    batch = pa.record_batch({f"b{n}": [n % 2 == 0] * 20_000 for n in range(columns)})
    sizes, asked = ChunkSize(most_bytes=4_000_000), []

    async def predict(rows: pa.Table) -> Predicted:
        asked.append(rows.num_rows)
        return Predicted([], Cost(1e-9, 1e-9))

    async def main() -> None:
        batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](0)
        with batches_out, results_out:
            with batches_in:
                for _ in range(20):
                    batches_in.send_nowait(batch)
            await predict_stream(predict, Source(batches_out).chunk, results_in, sizes=sizes)

    anyio.run(main)
    assert 8 * columns * max(asked) <= 4_000_000 < 2 * 8 * columns * max(asked)


def raises_unless_alone(rows: pd.DataFrame) -> pd.Series:
    if len(rows) > 1 and rows["x"].max() > 5:
        raise OverflowError(f"too many: {rows['x'].tolist()}")
    return rows["x"]


def test_a_model_that_raises_on_chunks_only_is_told_with_the_chunk() -> None:
    error = raised(Answers(raises_unless_alone), numbers(25), chunk_rows=8)

    assert error.members == {"exception": "OverflowError", "stream": 0, "row": None}
    assert "somewhere in the 8 rows from row 8 of read stream 0" in str(error)
    assert "too many" not in str(error)


def test_a_last_chunk_that_is_shorter_is_told_with_its_own_length() -> None:
    def answer(rows: pd.DataFrame) -> pd.Series:
        if 1 < len(rows) < 8:
            raise OverflowError
        return rows["x"]

    error = raised(Answers(answer), numbers(19), chunk_rows=8)

    assert "somewhere in the 3 rows from row 16 " in str(error)


@pytest.mark.parametrize("exception", [SystemExit, type("PanicException", (BaseException,), {})])
def test_what_is_no_exception_in_python_is_the_models_fault_as_well(
    exception: type[BaseException],
) -> None:
    error = raised(RaisesOn(4.0, exception=exception), numbers(20), chunk_rows=6)

    assert error.members == {"exception": exception.__name__, "stream": 0, "row": 8}


def test_an_exception_that_can_not_say_what_it_is_is_told_by_its_name_and_row() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            return self.args[5]

    error = raised(RaisesOn(4.0, exception=Mute), numbers(20), chunk_rows=6)

    assert error.members == {"exception": "Mute", "stream": 0, "row": 8}
    assert "at row 8 of read stream 0 (rows count from 0). Mute. Nothing was" in str(error)


def test_an_exception_that_says_what_is_no_text_is_told_in_text() -> None:
    def answer(rows: pd.DataFrame) -> pd.Series:
        if (rows["x"] == 4.0).any():
            raise ValueError("no answer for \udcff")
        return rows["x"]

    error = raised(Answers(answer), numbers(20), chunk_rows=6)

    assert "ValueError: no answer for \\udcff. Nothing" in str(error)


def test_a_model_that_drops_a_row_is_an_error_at_that_row_and_not_a_shift() -> None:
    model = Answers(lambda rows: rows["x"][rows["x"] != 5.0])

    error = raised(model, numbers(40), ids=["id"], chunk_rows=16)

    assert error.members["row"] == 10
    assert "predict gave 0 answers for 1 rows" in str(error)


def test_a_model_that_answers_less_than_it_said_is_an_error_for_float_ids_too() -> None:
    # Column by column such an answer would fit the ids' columns.
    rows = pa.table({"id": [0.0, 1.0], "x": [0.0, 1.0]})
    model = WithProbabilities([0.5, 1.5, 2.5], lambda n: np.ones((n, 4)))

    assert "4 columns where the classes make 3" in str(raised(model, rows, ids=["id"]))


# What a message may not say

SECRETS: dict[str, tuple[str, Any]] = {
    "a name": ("STRING", "Braund, Mr. Owen Harris"),
    "a word": ("STRING", "Zanzibar"),
    "quotes in words": ("STRING", """O'Hara said "Tara"\n"""),
    "a letter": ("STRING", "Q"),
    "what a pattern would mean": ("STRING", "a.*(b)[c]\\d+$"),
    "a whole number": ("INT64", 8675309),
    "a negative number": ("INT64", -42),
    "a number": ("FLOAT64", 3.14159265358979),
    "a tiny number": ("FLOAT64", 1.2345e-17),
    "a number that 32 bits can't hold": ("FLOAT64", 12345678.9),
    "a huge number": ("FLOAT64", 9.87654e200),
    "an amount": ("NUMERIC", Decimal("1234.560000000")),
    "bytes": ("BYTES", b"secret\xff"),
    "a date": ("DATE", dt.date(1987, 6, 5)),
    "a time": ("TIME", dt.time(13, 57, 11)),
    "a moment": ("DATETIME", dt.datetime(1987, 6, 5, 13, 57, 11)),
    "a moment in UTC": ("TIMESTAMP", dt.datetime(1987, 6, 5, 13, 57, 11, 123456, tzinfo=dt.UTC)),
    "a list": ("ARRAY<STRING>", ["Zanzibar", "Timbuktu"]),
}

# What of each value gives it away, and so must not be left over.
TELLING = re.compile(
    r"braund|owen|harris|zanzibar|timbuktu|hara|tara|\bQ\b|\(b\)|8675309|42|3\.1|14159|2345|98765|"
    r"secret|1987|13:57|13, 57|6, 5|11\.123",
    re.IGNORECASE,
)


def quoting(template: Callable[[Any], str]) -> Callable[[Any], Any]:
    def answer(rows: Any) -> Any:
        value = rows["x"].tolist()[0]
        if str(value) in ("0", "0.0", "", "b''", "[]", "0E-9"):
            return [1.0]  # The sample row.
        raise ValueError(template(value))

    return answer


TEMPLATES: dict[str, Callable[[Any], str]] = {
    "str": lambda value: f"can't take {value}",
    "repr": lambda value: f"invalid value {value!r} in column 'x'",
    "in quotes": lambda value: f'"{value}" is not known',
    "in brackets": lambda value: f"unknown categories [{value!r}]",
    "of a dictionary": lambda value: str(KeyError(value)),
    "twice": lambda value: f"{value} is not {value}!",
    "in upper case": lambda value: f"no such key: {str(value).upper()}",
    "in lower case": lambda value: f"no such key: {str(value).lower()}",
    "of its first part": lambda value: f"no such key: {re.split('[ ,T]', str(value))[0]}",
    "rounded": lambda value: f"out of range: {value:.2f}" if isinstance(value, float) else "",
    "in numpy": lambda value: f"out of range: {np.array([value])}",
    "as float32": lambda value: f"{float(np.float32(value))}" if isinstance(value, float) else "",
    "in a frame": lambda value: f"bad rows:\n{pd.DataFrame({'x': [value]})}",
    "in polars": lambda value: f"bad rows:\n{pl.DataFrame({'x': [value]})}",
}


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_error_never_quotes_a_value_of_the_row(secret: str, template: str) -> None:
    kind, value = SECRETS[secret]
    item = BIGQUERY_TO_ARROW[kind.removeprefix("ARRAY<").removesuffix(">")]
    column = pa.array([value], pa.list_(item) if kind.startswith("ARRAY") else item)

    error = raised(Answers(quoting(TEMPLATES[template])), pa.table({"x": column}))

    assert error.members["row"] == 0
    said = str(error).partition("ValueError")[2].partition("Nothing was written")[0]
    assert not TELLING.search(said), said


def test_a_message_of_more_digits_than_python_makes_an_int_of_is_told() -> None:
    def answer(rows: pd.DataFrame) -> Any:
        raise ValueError("no float: " + "7" * 5000)

    error = raised(Answers(answer), pa.table({"x": ["7" * 5000], "n": [3]}), features=("x", "n"))

    assert error.members["row"] == 0
    assert "7777" not in str(error)


LIBRARIES: dict[str, tuple[Any, pa.Table]] = {
    "an encoder": (
        fitted(
            make_pipeline(OneHotEncoder(handle_unknown="error"), LogisticRegression()),
            ["u", "v"] * 2,
            pd.DataFrame({"x": ["one", "two"] * 2}),
        ),
        pa.table({"x": ["one", "two", "Zanzibar"]}),
    ),
    "a number in words": (
        fitted(make_pipeline(StandardScaler(), Ridge()), [1, 2], pd.DataFrame({"x": ["1", "2"]})),
        pa.table({"x": ["1", "2", "Zanzibar"]}),
    ),
    "python's int": (
        fitted(
            make_pipeline(FunctionTransformer(lambda rows: rows.map(int)), Ridge()),
            [1, 2],
            pd.DataFrame({"x": ["1", "2"]}),
        ),
        pa.table({"x": ["1", "2", "8675309 or so"]}),
    ),
    "a dictionary": (
        Answers(lambda rows: [{"": 0.0, "one": 1.0}[each] for each in rows["x"]]),
        pa.table({"x": ["one", "one", "Zanzibar"]}),
    ),
    "a cast in polars": (
        Answers(lambda rows: pl.from_pandas(rows)["x"].str.replace("^$", "0").cast(pl.Int64)),
        pa.table({"x": ["1", "2", "Zanzibar"]}),
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_libraries_say_of_a_row_is_told_without_its_values(name: str) -> None:
    model, rows = LIBRARIES[name]

    error = raised(model, rows)

    assert error.members["row"] == 2
    assert not TELLING.search(str(error))
    assert "…" in str(error)


@pytest.mark.parametrize(
    "exception",
    [
        FileNotFoundError(2, "No such file or directory", PATH),
        ValueError(f"see {PATH} and {PATH}:17"),
        OSError(f"'{PATH}'"),
    ],
)
def test_an_error_never_tells_a_path(exception: Exception) -> None:
    def answer(rows: Any) -> Any:
        if rows["x"].iloc[0] == 1:
            raise exception
        return rows["x"]

    error = raised(Answers(answer), pa.table({"x": [0, 1]}), chunk_rows=1)

    assert error.members == {"exception": type(exception).__name__, "stream": 0, "row": 1}
    assert not re.search("srv|models|hidden|words", str(error))


def test_an_error_is_short_however_much_the_model_says() -> None:
    def answer(rows: Any) -> Any:
        if len(rows["x"].iloc[0]):
            raise ValueError("blah " * 1_000_000 + rows["x"].iloc[0])
        return [0.0]

    error = raised(Answers(answer), pa.table({"x": ["Zanzibar " * 10_000]}))

    assert len(str(error)) < 1000
    assert "Zanzibar" not in str(error)


def test_an_error_without_a_message_is_told_by_its_class() -> None:
    error = raised(Answers(refuses_one_row), numbers(1))

    assert "(rows count from 0). RuntimeError. Nothing was written." in str(error)


# Threads


class Gate:
    """A model that waits inside `predict`; counts how many calls are inside at once."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.left = threading.Semaphore(0)
        self.most = 0
        self._inside = 0
        self._lock = threading.Lock()

    def predict(self, rows: pd.DataFrame) -> Any:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        self.entered.release()
        try:
            assert self.open.wait(PATIENCE)
            return rows["x"]
        finally:
            with self._lock:
                self._inside -= 1
            self.left.release()

    def predictor(self) -> Predictor:
        """As `describe` would, but without asking the model."""
        simple = described(DOUBLE, numbers(1).select(["x"]))
        return Predictor(self, simple.frame, simple.features, simple.targets)


@contextmanager
def gate() -> Iterator[Gate]:
    each = Gate()
    try:
        yield each
    finally:
        each.open.set()


async def in_thread(call: Callable[..., Any], *args: Any) -> Any:
    return await anyio.to_thread.run_sync(call, *args, limiter=anyio.CapacityLimiter(1))


async def wait_for(semaphore: threading.Semaphore) -> None:
    assert await in_thread(semaphore.acquire, True, PATIENCE)


def test_a_run_that_is_cancelled_ends_at_once_though_the_model_is_at_work() -> None:
    rows = numbers(10)

    async def main(model: Gate) -> None:
        predictor = model.predictor()
        plan = plan_for(predictor, rows, chunk_rows=5)
        batches_in, batches_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        results_in, results_out = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
        with batches_in, batches_out, results_out:
            batches_in.send_nowait(rows.to_batches()[0])
            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(
                        lambda: predict_stream(
                            predicting(predictor, plan, rows.to_batches()),
                            Source(batches_out).chunk,
                            results_in,
                            sizes=sizes_of(plan),
                        )
                    )
                    await wait_for(model.entered)
                    tasks.cancel_scope.cancel()
            # The task has ended, with the model still inside.
            assert not model.left.acquire(blocking=False)
            model.open.set()
            await wait_for(model.left)
            assert [result async for result in results_out] == []
            assert not model.entered.acquire(blocking=False)

    with gate() as model:
        anyio.run(main, model)


def test_predict_calls_at_once_are_never_more_than_the_limiter_allows() -> None:
    rows = numbers(6)

    async def main(model: Gate) -> None:
        predictor = model.predictor()
        plan = plan_for(predictor, rows, chunk_rows=1)
        limiter = anyio.CapacityLimiter(2)
        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(
                    lambda number=number: stream(
                        predictor, plan, rows.to_batches(), limiter=limiter, number=number
                    )
                )
            await wait_for(model.entered)
            await wait_for(model.entered)
            await anyio.wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 3
            model.open.set()

    with gate() as model:
        anyio.run(main, model)
        assert model.most == 2


def test_a_call_that_was_cancelled_keeps_its_place_until_it_has_ended() -> None:
    rows = numbers(1)

    async def main(first: Gate, second: Gate) -> None:
        plan = plan_for(first.predictor(), rows)
        limiter = anyio.CapacityLimiter(1)

        async def run(model: Gate) -> None:
            await stream(model.predictor(), plan, rows.to_batches(), limiter=limiter)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, first)
            await wait_for(first.entered)
            tasks.cancel_scope.cancel()
        second.open.set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, second)
            await anyio.wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 1
            assert not second.entered.acquire(blocking=False)
            first.open.set()
        assert second.entered.acquire(blocking=False)
        assert limiter.available_tokens == 1

    with gate() as first, gate() as second:
        anyio.run(main, first, second)


def test_a_call_that_is_cancelled_before_it_has_begun_leaves_no_trace() -> None:
    rows = numbers(1)

    async def main(first: Gate, second: Gate) -> None:
        plan = plan_for(first.predictor(), rows)
        limiter = anyio.CapacityLimiter(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                lambda: stream(first.predictor(), plan, rows.to_batches(), limiter=limiter)
            )
            await wait_for(first.entered)
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(
                    lambda: stream(second.predictor(), plan, rows.to_batches(), limiter=limiter)
                )
                await anyio.wait_all_tasks_blocked()
                waiting.cancel_scope.cancel()
            first.open.set()
        assert limiter.available_tokens == 1
        assert not second.entered.acquire(blocking=False)

    with gate() as first, gate() as second:
        anyio.run(main, first, second)


def test_a_place_comes_back_however_a_call_ends() -> None:
    async def main() -> None:
        limiter = anyio.CapacityLimiter(1)
        for model in (DOUBLE, RaisesOn(0.5), RaisesOn(0.5, exception=SystemExit), DOUBLE):
            predictor = described(model, numbers(1).select(["x"]))
            plan = plan_for(predictor, numbers(2))
            try:
                await stream(predictor, plan, numbers(2).to_batches(), limiter=limiter)
            except ModelRaised:
                assert model is not DOUBLE
            assert limiter.available_tokens == 1

    anyio.run(main)
