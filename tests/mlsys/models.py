"""Models for the tests of the library. Importable, since a service unpickles them by their path."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin


class SeesTheSame(RegressorMixin, BaseEstimator):
    """Answers a number made of each row's values and their Python types.

    It raises where the columns, their dtypes or the kind of frame are not those it was fitted on.
    """

    def fit(self, rows: Any, y: Any = None) -> SeesTheSame:
        self.seen_ = _looks(rows)
        self.feature_names_in_ = np.array(rows.columns, dtype=object)
        self.n_features_in_ = len(rows.columns)
        return self

    def predict(self, rows: Any) -> np.ndarray:
        if (looks := _looks(rows)) != self.seen_:
            raise TypeError(f"fitted on {self.seen_}, asked about {looks}")
        columns = [rows[name].to_list() for name in rows.columns]
        return np.array([zlib.crc32(_told(row).encode()) for row in zip(*columns, strict=True)])


def _looks(rows: Any) -> tuple[str, list[tuple[str, str]]]:
    names = list(rows.columns)
    return type(rows).__module__, [(name, str(rows[name].dtype)) for name in names]


def _told(row: tuple[Any, ...]) -> str:
    return repr([(type(v).__name__, v.tolist() if hasattr(v, "tolist") else v) for v in row])


class Answers(BaseEstimator):
    """Answers the same whatever it is asked: one of `answers` a row, from the first one on."""

    def __init__(self, answers: Any, probabilities: Any = None) -> None:
        self.answers = answers
        self.probabilities = probabilities

    def predict(self, rows: Any) -> Any:
        return self.answers[: len(rows)]


class AnswersWithProbabilities(Answers):
    """Gives probabilities as well."""

    def predict_proba(self, rows: Any) -> Any:
        return self.probabilities[: len(rows)]


class AnswersElsewhere(Answers):
    """Answers something else wherever it is unpickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, answers=state["elsewhere"])

    def __init__(self, answers: Any, elsewhere: Any) -> None:
        super().__init__(answers)
        self.elsewhere = elsewhere


class LearnsUnderItsOwnNames(RegressorMixin, BaseEstimator):
    """Answers the mean, and has no attribute by which scikit-learn knows a fitted estimator."""

    def fit(self, rows: Any, y: Any) -> LearnsUnderItsOwnNames:
        self.mean = float(np.mean(y))
        return self

    def predict(self, rows: Any) -> np.ndarray:
        return np.full(len(rows), self.mean)


class KeepsNamesToItself(TransformerMixin, BaseEstimator):
    """Takes columns by their name, and tells nobody of them."""

    def fit(self, rows: Any, y: Any = None) -> KeepsNamesToItself:
        self.fitted_ = True
        return self

    def transform(self, rows: Any) -> np.ndarray:
        return np.column_stack([rows["a"], rows["b"]]).astype(float)
