"""The models that are measured, each fitted on made-up rows: the same ones each time."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import pandas as pd

from benchmarks import tables
from mlsys.clients import open_clients
from mlsys.frame import FrameKind, to_frame
from mlsys.gcs import write_blob
from mlsys.local import make_places
from mlsys.settings import Settings

_FITTED_ON = 5000


@dataclass(frozen=True)
class Kind:
    """A kind of model, and the kind of table that it predicts."""

    name: str
    title: str
    table: str
    fit: Callable[[pd.DataFrame], Any]

    def fitted(self) -> Any:
        import pyarrow as pa
        from threadpoolctl import threadpool_limits

        rows = pa.Table.from_batches([tables.made_up(self.table, _FITTED_ON)])
        # So few rows are fitted sooner by one thread, and far sooner where the cores are busy.
        with threadpool_limits(1):
            return self.fit(to_frame(rows.select(tables.FEATURES[self.table]), FrameKind.PANDAS))


def _linear(rows: pd.DataFrame) -> Any:
    from sklearn.linear_model import LinearRegression

    return LinearRegression().fit(rows, rows.sum(axis=1))


def _label(rows: pd.DataFrame) -> pd.Series:
    return (rows["f0"] * rows["f1"] + rows["f2"] + rows["i0"] / 1000 > 0.5).astype(int)


def _boosting(rows: pd.DataFrame) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(random_state=0).fit(rows, _label(rows))


def _forest(rows: pd.DataFrame) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(random_state=0).fit(rows, _label(rows))


def _strings(rows: pd.DataFrame) -> Any:
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    columns = make_column_transformer(
        (numbers, ["age", "visits", "score", "amount", "rating"]),
        (OneHotEncoder(handle_unknown="ignore"), ["city", "product", "member"]),
    )
    label = (rows["amount"] + 10 * rows["visits"] > 110).astype(int)
    return make_pipeline(columns, LogisticRegression(max_iter=1000)).fit(rows, label)


def _text(rows: pd.DataFrame) -> Any:
    from sklearn.compose import make_column_transformer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    columns = make_column_transformer((TfidfVectorizer(ngram_range=(1, 2)), "text"))
    label = rows["text"].str.contains("late")
    return make_pipeline(columns, LogisticRegression()).fit(rows, label)


LINEAR = Kind("linear", "linear regression", tables.NUMERIC, _linear)
BOOSTING = Kind("boosting", "gradient boosting", tables.NUMERIC, _boosting)
FOREST = Kind("forest", "random forest", tables.NUMERIC, _forest)
STRINGS = Kind("strings", "pipeline with strings", tables.MIXED, _strings)
TEXT = Kind("text", "text vectorizer", tables.TEXT, _text)
KINDS = (LINEAR, BOOSTING, FOREST, STRINGS, TEXT)


def publish(settings: Settings, *kinds: Kind) -> None:
    """Makes the buckets, and stores the models in dev, each as its version v1."""
    anyio.run(_publish, settings, {kind.name: pickle.dumps(kind.fitted()) for kind in kinds})


async def _publish(settings: Settings, pickles: dict[str, bytes]) -> None:
    async with open_clients(settings) as clients:
        await make_places(clients, settings)
        for name, data in pickles.items():
            path = f"{name}/v1/model.pkl"
            await write_blob(clients.objects, settings.gcs_bucket_models_dev, path, data)
