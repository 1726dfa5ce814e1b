"""What tests put into models. Importable, since a pickle names classes and functions by path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pandas as pd
import polars as pl
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

calls: Counter[str] = Counter()


class Stateless(TransformerMixin, BaseEstimator):
    """A transformer that learns nothing, as people write them: it has no fitted attributes."""

    def fit(self, rows: Any, y: Any = None) -> Self:
        return self

    def transform(self, rows: Any) -> Any:
        return rows


class CountsTransforms(Stateless):
    """Counts how often it transforms, in `calls`, by its name."""

    def __init__(self, name: str = "transform") -> None:
        self.name = name

    def transform(self, rows: Any) -> Any:
        calls[self.name] += 1
        return rows


class CountsProbabilities:
    """Counts how often an estimator is asked for probabilities and for labels, in `calls`."""

    def predict_proba(self, rows: Any, **options: Any) -> np.ndarray:
        calls["predict_proba"] += 1
        return super().predict_proba(rows, **options)

    def predict(self, rows: Any, **options: Any) -> np.ndarray:
        calls["predict"] += 1
        return super().predict(rows, **options)


class CountingTree(CountsProbabilities, DecisionTreeClassifier):
    """A decision tree that counts."""


class CountingLogistic(CountsProbabilities, LogisticRegression):
    """A logistic regression that counts."""


class Answers:
    """A model of no library: its answer is that of a function of the rows."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer = answer

    def predict(self, rows: Any) -> Any:
        return self.answer(rows)


class Refuses(RegressorMixin, BaseEstimator):
    """Wraps an estimator; raises on a row of zeros, such as nobody sends."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def fit(self, rows: Any, y: Any = None) -> Self:
        self.fitted_ = self.estimator.fit(rows, y)
        return self

    def predict(self, rows: Any) -> Any:
        if (np.asarray(rows, dtype=float) == 0).all(axis=1).any():
            raise ValueError("a row of zeros")
        return self.fitted_.predict(rows)


def dates_taken_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """The parts of `price` NUMERIC, `born` DATE and `seen` TIMESTAMP that a model can use."""
    seen = rows["seen"]
    assert str(seen.dtype) == "datetime64[us, UTC]"
    return pd.DataFrame(
        {
            "price": [float("nan") if each is None else float(each) for each in rows["price"]],
            "year": [float("nan") if each is None else each.year for each in rows["born"]],
            "hour": seen.dt.hour.astype("float64"),
            "microsecond": seen.dt.microsecond.astype("float64"),
        }
    )


def polars_features(rows: pl.DataFrame) -> pl.DataFrame:
    """Features by expressions, which no other kind of frame understands."""
    return rows.select(
        pl.col("word").str.len_chars().fill_null(-1).alias("length"),
        pl.col("amount").fill_null(pl.lit(0)).cast(pl.Float64).alias("amount"),
        pl.col("word").str.contains("a").fill_null(value=False).cast(pl.Float64).alias("has_a"),
    )


def lengths_of_lists(rows: pd.DataFrame) -> pd.DataFrame:
    """How many items each list has."""
    return pd.DataFrame({name: rows[name].map(len) for name in rows.columns})


def checked_nullable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows as they are; raises where a whole number came as anything but Int64."""
    assert [str(each) for each in rows.dtypes] == ["Int64", "float64"], rows.dtypes
    return rows
