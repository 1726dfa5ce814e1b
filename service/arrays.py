"""The same predictions without a frame, where scikit-learn would make an array of it first.

Many estimators turn whatever they get into an array of floats, by columns, before they look at a
value. To build a pandas frame for that and to take it apart again costs them some milliseconds a
call, all of it with the interpreter's lock held: for a linear model several times what predicting
does. They get the array itself here, the very one that would come out of the frame.
"""

from __future__ import annotations

import copy
from typing import Any

import pyarrow as pa

# scikit-learn 1.9: what these do first is `validate_data`, which makes float64 of a frame of
# numbers. A forest is not among them: it makes float32, so it rounds integers once and not twice.
_ESTIMATORS = {
    "sklearn.ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingClassifier",
    "sklearn.ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingRegressor",
    "sklearn.linear_model._base.LinearRegression",
    "sklearn.linear_model._coordinate_descent.ElasticNet",
    "sklearn.linear_model._coordinate_descent.ElasticNetCV",
    "sklearn.linear_model._coordinate_descent.Lasso",
    "sklearn.linear_model._coordinate_descent.LassoCV",
    "sklearn.linear_model._logistic.LogisticRegression",
    "sklearn.linear_model._logistic.LogisticRegressionCV",
    "sklearn.linear_model._ridge.Ridge",
    "sklearn.linear_model._ridge.RidgeCV",
    "sklearn.linear_model._ridge.RidgeClassifier",
    "sklearn.linear_model._stochastic_gradient.SGDClassifier",
    "sklearn.linear_model._stochastic_gradient.SGDRegressor",
}
_TRANSFORMERS = {
    "sklearn.impute._base.SimpleImputer",
    "sklearn.preprocessing._data.MinMaxScaler",
    "sklearn.preprocessing._data.RobustScaler",
    "sklearn.preprocessing._data.StandardScaler",
}


def class_path(model: Any) -> str:
    """Where a class is defined and how it is called: a subclass of it is another."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def on_arrays(estimator: Any) -> Any | None:
    """The same estimator for arrays by columns; None where frames may make a difference to it.

    What it was fitted with is shared, not copied; the names of its features are left out, or it
    would warn of an array that has none.
    """
    if class_path(estimator) != "sklearn.pipeline.Pipeline":
        return _without_names(estimator) if _takes_array(estimator, _ESTIMATORS) else None
    *before, (_, last) = estimator.steps
    if estimator.transform_input is not None or not _takes_array(last, _ESTIMATORS):
        return None
    if not all(_takes_array(step, _TRANSFORMERS) for _, step in before):
        return None
    pipeline = copy.copy(estimator)
    pipeline.steps = [(name, _without_names(step)) for name, step in estimator.steps]
    return pipeline


def _takes_array(step: Any, known: set[str]) -> bool:
    return (
        class_path(step) in known
        # Boosting whose columns of categories are found by their dtype, in the frame.
        and getattr(step, "_preprocessor", None) is None
        # A transformer that is to make frames again.
        and not getattr(step, "_sklearn_output_config", None)
    )


def _without_names(step: Any) -> Any:
    bare = copy.copy(step)
    vars(bare).pop("feature_names_in_", None)
    return bare


def plain_numbers(schema: pa.Schema) -> bool:
    """Whether pandas and scikit-learn make an array of float64 of such columns, nulls as NaN."""
    types = pa.types
    return all(
        types.is_int64(kind) or types.is_float64(kind) or types.is_boolean(kind)
        for kind in schema.types
    )
