"""A model into its bucket: complete, once, and refused where it answers otherwise."""

from __future__ import annotations

import datetime as dt
import getpass
import hashlib
import http.client
import itertools
import json
import pickle
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sklearn
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

from mlsys import Settings, bq_get, bq_put, gcs_get, gcs_list_blobs, publish_model
from mlsys.errors import Conflict, InvalidRequest, MlsysError, NotFound, Unavailable
from mlsys.frame import FrameKind, to_arrow
from mlsys.local import LocalServers
from mlsys.publish import PublishedModel
from tests.conftest import Client, Cloud
from tests.mlsys.models import (
    Answers,
    AnswersElsewhere,
    KeepsNamesToItself,
    LearnsUnderItsOwnNames,
)
from tests.mlsys.rest_server import Answer, Request, RestServer, rest_server
from tests.service.support import assert_problem, process_environment

PATIENCE = 30
BUCKET = "mlsys-models-dev"

ROWS = pd.DataFrame(
    {"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "b": [0.5, 0.25, 1.5, 2.5, 0.5, 1.0], "id": range(6)}
)
FEATURES = ROWS[["a", "b"]]
SUM = (ROWS["a"] + ROWS["b"]).to_numpy()


@pytest.fixture
def name(cloud: Cloud) -> str:
    return cloud.name("model").replace("_", "-")


@pytest.fixture
def model() -> LinearRegression:
    return LinearRegression().fit(FEATURES, SUM)


def stored(settings: Settings, name: str, version: str) -> tuple[bytes, dict[str, Any]]:
    """The two files of a version."""
    text = gcs_get(BUCKET, f"{name}/{version}/metadata.json", settings=settings)
    return gcs_get(BUCKET, f"{name}/{version}/model.pkl", settings=settings), json.loads(text)


def files(settings: Settings, name: str) -> list[str]:
    paths = gcs_list_blobs(BUCKET, f"{name}/", settings=settings)
    return [path.removeprefix(f"{name}/") for path in paths]


# What is written


def test_a_model_is_stored_with_all_that_is_known_of_it(settings: Settings, name: str) -> None:
    labels = np.array(["lo", "lo", "lo", "hi", "hi", "hi"])
    rows = ROWS.astype({"a": "float32", "id": "Int64"})
    forest = RandomForestClassifier(n_estimators=5, random_state=0).fit(rows[["b", "a"]], labels)
    before = dt.datetime.now(dt.UTC)

    published = publish_model(
        forest,
        name,
        rows=rows,
        target="size",
        id_columns=["id"],
        metrics={"accuracy": np.float64(0.75)},
        metadata={"owner": "me", "rows": np.int64(6), "at": np.array([1, 2])},
        settings=settings,
    )

    pickled, metadata = stored(settings, name, "v1")
    assert pickle.loads(pickled).predict(rows[["b", "a"]]).tolist() == labels.tolist()
    trained_at = dt.datetime.fromisoformat(metadata.pop("trained_at"))
    assert before <= trained_at <= dt.datetime.now(dt.UTC)
    golden = metadata.pop("golden")
    assert metadata == {
        "features": [
            {"name": "b", "type": "FLOAT64", "dtype": "float64"},
            {"name": "a", "type": "FLOAT64", "dtype": "float32"},
        ],
        "frame": "pandas",
        "target": "size",
        "id_columns": ["id"],
        "classes": ["hi", "lo"],
        "metrics": {"accuracy": 0.75},
        "sklearn_version": sklearn.__version__,
        "python_version": platform.python_version(),
        "sha256": hashlib.sha256(pickled).hexdigest(),
        "owner": "me",
        "rows": 6,
        "at": [1, 2],
    }
    assert golden["rows"] == rows[["b", "a"]].head(5).to_dict("records")
    assert golden["predictions"] == labels[:5].tolist()
    assert golden["probabilities"] == forest.predict_proba(rows[["b", "a"]])[:5].tolist()
    assert published.name == name
    assert published.version == "v1"
    assert published.uri == f"gs://{BUCKET}/{name}/v1/model.pkl"
    assert published.metadata.sha256 == metadata["sha256"]


def test_the_registry_is_told_who_publishes(
    service: Client, cloud: Cloud, settings: Settings, name: str, model: LinearRegression
) -> None:
    publish_model(model, name, rows=FEATURES, settings=settings)
    table = service.get("/model-registry", params={"env": "dev"}).json()["table"]

    [row] = cloud.query(f"SELECT uploader FROM `{table}` WHERE model_name = '{name}'")
    assert row["uploader"] == getpass.getuser()


def test_what_is_told_of_a_model_that_tells_nothing_of_itself_is_kept(
    settings: Settings, name: str
) -> None:
    bare = LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])
    publish_model(
        bare, name, metadata={"features": ["a"], "metrics": {"r2": 1.0}}, settings=settings
    )

    _, metadata = stored(settings, name, "v1")
    assert metadata["features"] == ["a"]
    assert metadata["metrics"] == {"r2": 1.0}


def test_without_rows_a_model_is_stored_with_what_it_tells_of_itself(
    service: Client, cloud: Cloud, settings: Settings, name: str, model: LinearRegression
) -> None:
    publish_model(model, name, metadata={"owner": "me"}, settings=settings)

    _, metadata = stored(settings, name, "v1")
    assert metadata["features"] == ["a", "b"]
    assert metadata["owner"] == "me"
    assert "golden" not in metadata
    output = cloud.new_table()
    assert service.predict(cloud.put(to_arrow(ROWS)), output, name).status_code == 200
    assert [row["Prediction"] for row in cloud.rows(output, "id")] == pytest.approx(SUM)


def test_a_time_of_training_that_was_before_may_be_told(
    settings: Settings, name: str, model: LinearRegression
) -> None:
    then = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)

    publish_model(
        model,
        name,
        rows=FEATURES,
        id_columns="id",
        target=["sum"],
        metadata={"trained_at": then, "golden": "no", "sha256": "no"},
        settings=settings,
    )

    _, metadata = stored(settings, name, "v1")
    assert dt.datetime.fromisoformat(metadata["trained_at"]) == then
    assert metadata["id_columns"] == ["id"]
    assert metadata["target"] == ["sum"]
    assert len(metadata["golden"]["rows"]) == 5
    assert len(metadata["sha256"]) == 64


def test_each_environment_has_its_bucket(
    settings: Settings, name: str, model: LinearRegression
) -> None:
    published = publish_model(model, name, rows=FEATURES, env="staging", settings=settings)

    assert published.uri == f"gs://mlsys-models-staging/{name}/v1/model.pkl"
    assert files(settings, name) == []


# Versions


def published_as(
    settings: Settings, name: str, model: Any, version: str = "next"
) -> PublishedModel:
    return publish_model(model, name, version, rows=FEATURES, settings=settings)


def test_the_next_version_is_the_one_after_the_highest(
    cloud: Cloud, settings: Settings, name: str, model: LinearRegression
) -> None:
    versions = [published_as(settings, name, model).version for _ in range(2)]
    versions.append(published_as(settings, name, model, "v9").version)
    versions.append(published_as(settings, name, model).version)
    cloud.upload(f"{name}/v20/model.pkl", b"by hand")
    cloud.upload(f"{name}/v30/model.pkl.bak", b"no model")
    cloud.upload(f"{name}-other/v40/model.pkl", b"of another name")
    versions.append(published_as(settings, name, model).version)

    assert versions == ["v1", "v2", "v9", "v10", "v21"]


@pytest.mark.parametrize(
    "there", [["model.pkl", "metadata.json"], ["model.pkl"], ["metadata.json"]]
)
def test_a_version_that_exists_stays_as_it_is_byte_for_byte(
    cloud: Cloud, settings: Settings, name: str, model: LinearRegression, there: list[str]
) -> None:
    for file in there:
        cloud.upload(f"{name}/v3/{file}", f"somebody's {file}".encode())

    with pytest.raises(Conflict, match=rf"{name}/v3/{there[0]} exists, and .* `next`"):
        published_as(settings, name, model, "v3")

    assert sorted(files(settings, name)) == sorted(f"v3/{file}" for file in there)
    for file in there:
        content = gcs_get(BUCKET, f"{name}/v3/{file}", settings=settings)
        assert content == f"somebody's {file}".encode()


def test_publishers_at_once_get_versions_of_their_own(settings: Settings, name: str) -> None:
    models = [LinearRegression().fit(FEATURES, SUM * factor) for factor in range(1, 7)]
    barrier = threading.Barrier(len(models))

    def publish(model: Any) -> PublishedModel:
        barrier.wait(PATIENCE)
        return published_as(settings, name, model)

    with ThreadPoolExecutor(len(models)) as threads:
        published = list(threads.map(publish, models))

    versions = sorted(each.version for each in published)
    assert len(set(versions)) == len(models)
    for each, model in zip(published, models, strict=True):
        pickled, metadata = stored(settings, name, each.version)
        assert pickled == pickle.dumps(model)
        assert hashlib.sha256(pickled).hexdigest() == metadata["sha256"]
        assert metadata["golden"]["predictions"] == model.predict(FEATURES)[:5].tolist()


def test_of_publishers_of_one_version_one_succeeds(settings: Settings, name: str) -> None:
    models = [LinearRegression().fit(FEATURES, SUM * factor) for factor in range(1, 5)]
    barrier = threading.Barrier(len(models))

    def publish(model: Any) -> MlsysError | None:
        barrier.wait(PATIENCE)
        try:
            published_as(settings, name, model, "v1")
        except MlsysError as error:
            return error
        return None

    with ThreadPoolExecutor(len(models)) as threads:
        raised = list(threads.map(publish, models))

    assert sorted(type(each).__name__ for each in raised) == ["Conflict"] * 3 + ["NoneType"]
    pickled, metadata = stored(settings, name, "v1")
    assert pickled == pickle.dumps(models[raised.index(None)])
    assert hashlib.sha256(pickled).hexdigest() == metadata["sha256"]


@contextmanager
def in_between(settings: Settings) -> Iterator[tuple[RestServer, Settings]]:
    """A server in front of Cloud Storage; `answer` may be wrapped."""
    target = urlsplit(settings.storage_emulator_host).netloc

    def forward(request: Request) -> Answer:
        with closing(http.client.HTTPConnection(target)) as connection:
            path = f"{request.path}?{request.query}"
            # The body names its own boundary.
            boundary = request.body.partition(b"\r\n")[0].removeprefix(b"--").decode()
            kind = f"multipart/related; boundary={boundary}"
            headers = {"Content-Type": kind} if request.method == "POST" else {}
            connection.request(request.method, path, request.body, headers)
            response = connection.getresponse()
            return response.status, response.read()

    with rest_server() as server:
        server.answer = forward
        away = {"storage_emulator_host": server.url, "retry_seconds": 0.01}
        yield server, settings.model_copy(update=away)


def is_upload_of(file: str, request: Request) -> bool:
    return request.method == "POST" and file.encode() in request.body[:2000]


def assert_nothing_but_a_claim(
    service: Client, settings: Settings, name: str, model: LinearRegression, cloud: Cloud
) -> None:
    """A version without its model is none for the service, and in nobody's way."""
    assert files(settings, name) == ["v1/metadata.json"]
    table = cloud.put(pa.Table.from_pandas(ROWS))
    output = cloud.new_table()
    assert_problem(service.predict(table, output, name), 404, name)
    again = published_as(settings, name, model)
    assert again.version == "v2"
    response = service.predict(table, output, name)
    assert response.status_code == 200, response.text
    assert cloud.rows(output)[0]["ModelVersion"] in ("v2", 2)


def test_an_upload_that_fails_half_way_leaves_no_version_that_would_be_loaded(
    service: Client, cloud: Cloud, settings: Settings, name: str, model: LinearRegression
) -> None:
    with in_between(settings) as (rest, own):
        forward = rest.answer
        rest.answer = lambda r: (503, b"") if is_upload_of("model.pkl", r) else forward(r)
        with pytest.raises(Unavailable, match=r"model\.pkl can't be reached"):
            published_as(own, name, model)

    assert_nothing_but_a_claim(service, settings, name, model, cloud)


PUBLISHED = """
import pandas as pd, sys
from sklearn.linear_model import LinearRegression
from mlsys import publish_model
rows = pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 3.0]})
publish_model(LinearRegression().fit(rows, rows["a"]), sys.argv[1], rows=rows)
"""


def test_a_process_that_is_killed_half_way_leaves_no_version_that_would_be_loaded(
    service: Client,
    servers: LocalServers,
    cloud: Cloud,
    settings: Settings,
    name: str,
    model: LinearRegression,
) -> None:
    half_way, over = threading.Event(), threading.Event()
    with in_between(settings) as (rest, own):
        forward = rest.answer

        def hold_the_model(request: Request) -> Answer:
            if is_upload_of("model.pkl", request):
                half_way.set()
                over.wait(PATIENCE)
                return 503, b""
            return forward(request)

        rest.answer = hold_the_model
        env = servers.env | {"STORAGE_EMULATOR_HOST": own.storage_emulator_host}
        command = [sys.executable, "-c", PUBLISHED, name]
        with subprocess.Popen(
            command, env=process_environment(**env), stderr=subprocess.DEVNULL
        ) as process:
            assert half_way.wait(PATIENCE)
            process.kill()
        over.set()

    assert process.returncode == -signal.SIGKILL
    assert_nothing_but_a_claim(service, settings, name, model, cloud)


# What the service makes of it

KINDS = pd.DataFrame(
    {
        "a": [1.0, 2.0, None, 4.0, 5.0, 6.0],
        "b": [0.5, 0.25, 1.5, 2.5, float("inf"), 1.0],
        "word": ["x", "y", None, "x", "y", "z"],
        "id": range(6),
    }
)
WORDS = np.array(["no", "yes", "no", "yes", "no", "yes"])
TWO = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1], [1, 1]])

PREDICTORS = {
    "a classifier of words": KNeighborsClassifier(1).fit(FEATURES, WORDS),
    "a classifier of booleans": LogisticRegression().fit(FEATURES, WORDS == "yes"),
    "one without probabilities": LinearSVC().fit(FEATURES, WORDS),
    "one of several targets": MultiOutputClassifier(LogisticRegression()).fit(FEATURES, TWO),
    "a regressor of several targets": LinearRegression().fit(FEATURES, TWO),
    "a regressor of single precision": LinearRegression().fit(FEATURES.astype("float32"), SUM),
    "a clusterer": KMeans(2, n_init=1, random_state=0).fit(FEATURES),
    "an outlier detector": IsolationForest(n_estimators=5, random_state=0).fit(FEATURES),
    "one of bare arrays": LinearRegression().fit(FEATURES.to_numpy(), SUM),
    "one that answers nan and infinity": Answers(
        np.array([np.nan, np.inf, -np.inf, 1.0, 2.0, 3.0])
    ),
    "one whose names are its own": make_pipeline(KeepsNamesToItself(), LinearRegression()).fit(
        FEATURES, SUM
    ),
}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_the_service_takes_a_model_that_answers_as_it_did(
    service: Client, cloud: Cloud, settings: Settings, name: str, kind: str
) -> None:
    predictor = PREDICTORS[kind]
    publish_model(predictor, name, rows=FEATURES, id_columns="id", settings=settings)
    table, output = cloud.put(pa.Table.from_pandas(ROWS)), cloud.new_table("scored")

    response = service.predict(table, output, name)

    assert response.status_code == 200, response.text
    assert cloud.count(output) == len(ROWS)


CITIES = {"id": list(range(6)), "city": ["Rome", None, "Oslo"] * 2, "y": [10.0, 30.0, 20.0] * 2}


def test_a_missing_word_in_a_bare_array_is_what_it_was_in_the_notebook(
    service: Client, cloud: Cloud, settings: Settings, name: str
) -> None:
    table = cloud.put(pa.table(CITIES))
    rows = bq_get(table, settings=settings)
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LinearRegression())
    model.fit(rows[["city"]].to_numpy(), rows["y"])
    metadata = {"features": ["city"]}
    publish_model(model, name, rows=rows, metadata=metadata, id_columns="id", settings=settings)
    output = cloud.new_table("scored")

    response = service.predict(table, output, name)

    assert response.status_code == 200, response.text
    told = [row["Prediction"] for row in cloud.rows(output, order_by="id")]
    assert told == pytest.approx(rows.sort_values("id")["y"].tolist())


def test_a_model_of_arrays_that_the_service_does_not_make_is_refused(
    settings: Settings, name: str
) -> None:
    rows = pl.DataFrame(CITIES).select("city", "y")
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LinearRegression())
    model.fit(rows.select("city").to_numpy(), rows["y"].to_numpy())

    with pytest.raises(InvalidRequest, match="2 of 5 predictions differ.*missing word is NaN"):
        publish_model(model, name, rows=rows.select("city"), settings=settings)


def test_rows_of_more_columns_than_a_bare_model_has_are_told_as_that(
    settings: Settings, name: str
) -> None:
    bare = LinearRegression().fit(FEATURES.to_numpy(), SUM)

    with pytest.raises(InvalidRequest, match="rows has 3 columns, and the model was fitted on 2"):
        publish_model(bare, name, rows=ROWS, settings=settings)
    told = {"features": ["a", {"name": "b"}]}
    published = publish_model(bare, name, rows=ROWS, metadata=told, settings=settings)

    assert [each.name for each in published.metadata.typed_features()] == ["a", "b"]


def test_features_with_gaps_and_infinities_are_asked_again_as_they_were(
    service: Client, cloud: Cloud, settings: Settings, name: str
) -> None:
    columns = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["word"]), remainder="drop"
    )
    features = KINDS[["a", "b", "word"]]
    model = make_pipeline(columns, LogisticRegression()).fit(features, WORDS)
    publish_model(model, name, rows=KINDS, id_columns="id", settings=settings)
    table, output = cloud.new_table(), cloud.new_table("scored")
    bq_put(KINDS, table, settings=settings)

    response = service.predict(table, output, name)

    assert response.status_code == 200, response.text
    rows = cloud.rows(output, order_by="id")
    assert [row["Prediction"] for row in rows] == model.predict(features).tolist()
    [golden] = [stored(settings, name, "v1")[1]["golden"]["rows"]]
    assert golden[2] == {"a": None, "b": 1.5, "word": None}
    assert golden[4] == {"a": 5.0, "b": "Infinity", "word": "y"}


def test_a_model_trained_on_polars_frames_is_given_polars_frames(
    service: Client, cloud: Cloud, settings: Settings, name: str
) -> None:
    table, output = cloud.put(pa.Table.from_pandas(ROWS)), cloud.new_table("scored")
    rows = bq_get(table, "polars", settings=settings)
    model = LinearRegression().fit(rows.select("a", "b"), SUM)

    published = publish_model(model, name, rows=rows, id_columns="id", settings=settings)

    assert published.metadata.frame == FrameKind.POLARS
    assert [each.dtype for each in published.metadata.typed_features()] == ["Float64", "Float64"]
    assert service.predict(table, output, name).status_code == 200
    told = {row["id"]: row["Prediction"] for row in cloud.rows(output)}
    assert [told[number] for number in range(6)] == pytest.approx(SUM.tolist())


def test_rows_may_be_an_arrow_table(settings: Settings, name: str, model: LinearRegression) -> None:
    rows = pa.table({"b": pa.array([1], pa.int32()), "a": pa.array([Decimal("1.5")])})

    published = publish_model(model, name, rows=rows, settings=settings)

    assert [each.model_dump() for each in published.metadata.typed_features()] == [
        {"name": "a", "type": "NUMERIC", "dtype": "decimal128(2, 1)"},
        {"name": "b", "type": "INT64", "dtype": "int32"},
    ]


@pytest.mark.parametrize(
    ("elsewhere", "told"),
    [
        (np.array([1.0, 2.0, 3.0, 4.0, 5.5]), "1 of 5 predictions differ"),
        (np.array(["a", "b", "c", "d", "e"]), "5 of 5 predictions differ"),
        (np.array([1.0]), "1 answers for 5 rows"),
        (None, "it raises TypeError"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_the_service_refuses_a_model_that_answers_otherwise_and_names_it(
    service: Client, cloud: Cloud, settings: Settings, name: str, elsewhere: Any, told: str
) -> None:
    model = AnswersElsewhere(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), elsewhere)
    publish_model(model, name, rows=FEATURES, settings=settings)
    table, output = cloud.put(pa.Table.from_pandas(ROWS)), cloud.new_table("scored")

    for _ in range(2):
        response = service.predict(table, output, name)

        problem = assert_problem(response, 500, f"{name}/v1/model.pkl", told, sklearn.__version__)
        assert problem["type"] == "urn:mlsys:model-unusable"
    assert not cloud.exists(output)


# What is refused before anything is written


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "Titanic"}, "'Titanic' is not a model name"),
        ({"version": "latest"}, "'latest' is no version to write"),
        ({"name": LinearRegression()}, "name is a LinearRegression. Pass the model first"),
        ({"version": "1"}, "'1' is no version to write. Use v1, v2, … or next"),
        ({"version": 1}, "'1' is no version to write"),
        ({"env": "test"}, "env is 'test'. Use one of dev, staging, prod"),
        ({"rows": FEATURES.head(0)}, "rows is empty"),
        ({"rows": ROWS[["a"]]}, "rows lacks features of the model: b"),
        ({"rows": FEATURES.to_numpy()}, "A ndarray is no frame"),
        ({"rows": FEATURES.assign(a="x")}, "does not predict these rows"),
        ({"rows": FEATURES.assign(b=1j)}, "Column 'b'"),
        ({"model": Answers(lambda: 1)}, "can't be pickled"),
        ({"target": "a.b"}, "target: BigQuery has no column of the name 'a.b'"),
        ({"target": "price ($)"}, "target: BigQuery has no column of the name 'price ($)'"),
        ({"target": "x" * 301}, "at most 300"),
        ({"target": ["  "]}, "target: BigQuery has no column of the name '  '"),
        ({"metadata": {"target": ""}}, "target: BigQuery has no column of the name ''"),
        ({"id_columns": ["id", "a.b"]}, "id_columns: BigQuery has no column of the name 'a.b'"),
        ({"id_columns": ["id", "ID"]}, "id_columns names a column more than once: id, ID"),
        ({"target": "Id", "id_columns": "id"}, "several columns of one name: id, Id. Leave"),
        ({"id_columns": ["id", "modelname"]}, "several columns of one name: modelname"),
        ({"id_columns": "prediction"}, "several columns of one name: prediction, Prediction"),
        ({"target": "PredictionTimestamp"}, "several columns of one name: PredictionTimestamp"),
        ({"target": ["sum", "more"]}, "target has 2 names, but the model predicts 1 columns"),
        ({"metrics": {"a": "high"}}, "could not convert string to float: 'high'. Pass numbers"),
        ({"metrics": "high"}, "metadata.json can't be written"),
        ({"metadata": {"id_columns": "id"}}, "id_columns: Input should be a valid list. Pass"),
        ({"metadata": "by me"}, "metadata.json can't be written"),
        ({"target": 1}, "metadata.json can't be written"),
    ],
    ids=lambda each: each if isinstance(each, str) else next(iter(each)),
)
def test_what_can_not_be_published_is_told_and_leaves_nothing(
    settings: Settings, name: str, model: LinearRegression, changes: dict[str, Any], told: str
) -> None:
    asked = {"model": model, "name": name, "rows": FEATURES} | changes

    with pytest.raises(InvalidRequest) as refused:
        publish_model(**asked, settings=settings)

    assert told in str(refused.value)
    assert files(settings, name) == []


@pytest.mark.parametrize("rows", [None, FEATURES], ids=["without rows", "with rows"])
@pytest.mark.parametrize(
    ("predictor", "told"),
    [
        (None, "is a NoneType, which can't predict"),
        ({"coef": 1}, "is a dict, which can't predict"),
        (StandardScaler().fit(FEATURES), "is a StandardScaler, which can't predict"),
        (LogisticRegression, "not its class"),
        (LogisticRegression(), "The LogisticRegression is not fitted"),
        (make_pipeline(StandardScaler(), LogisticRegression()), "The Pipeline is not fitted"),
        (FixedThresholdClassifier(LogisticRegression()), "is not fitted"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_can_not_predict_is_told_and_leaves_nothing(
    settings: Settings, name: str, predictor: Any, rows: pd.DataFrame | None, told: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        publish_model(predictor, name, rows=rows, settings=settings)

    assert told in str(refused.value)
    assert files(settings, name) == []


@pytest.mark.parametrize(
    "predictor",
    [
        Answers(np.arange(6)),
        FixedThresholdClassifier(LogisticRegression().fit(FEATURES, WORDS == "yes")),
        LearnsUnderItsOwnNames().fit(FEATURES, SUM),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_predicts_without_being_fitted_is_published(
    settings: Settings, name: str, predictor: Any
) -> None:
    for rows in (None, FEATURES):
        publish_model(predictor, name, rows=rows, settings=settings)

    assert len(files(settings, name)) == 4


def test_one_name_will_do_for_several_targets(
    service: Client, cloud: Cloud, settings: Settings, name: str
) -> None:
    model = LinearRegression().fit(FEATURES, TWO)
    publish_model(model, name, rows=FEATURES, target="y", id_columns="id", settings=settings)
    table, output = cloud.put(pa.Table.from_pandas(ROWS)), cloud.new_table("scored")

    assert service.predict(table, output, name).status_code == 200
    assert list(cloud.columns(output))[:3] == ["id", "y_0", "y_1"]


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.from_pandas, pa.Table.from_pandas])
def test_of_rows_the_features_alone_are_looked_at(
    settings: Settings, name: str, model: LinearRegression, kind: Callable[[pd.DataFrame], Any]
) -> None:
    more = kind(ROWS.assign(**{"no column!": 1})[["b", "no column!", "a"]])
    published = publish_model(model, name, rows=more, settings=settings)

    assert [each.name for each in published.metadata.features] == ["a", "b"]
    assert published.metadata.golden.predictions == pytest.approx(SUM[:5])


TEXTS = pd.DataFrame({"text": ["good", "bad", "good one", "bad one", "so good", "so bad"]})


def test_a_model_of_text_has_to_pick_its_column_from_a_frame(
    service: Client, cloud: Cloud, settings: Settings, name: str
) -> None:
    of_a_series = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS["text"], WORDS)
    with pytest.raises(InvalidRequest, match=r"1 answers for 5 rows\..* with a ColumnTransformer"):
        publish_model(of_a_series, name, rows=TEXTS, settings=settings)
    assert files(settings, name) == []

    columns = make_column_transformer((TfidfVectorizer(), "text"))
    of_a_frame = make_pipeline(columns, LogisticRegression()).fit(TEXTS, WORDS)
    publish_model(of_a_frame, name, rows=TEXTS, settings=settings)
    table, output = cloud.new_table(), cloud.new_table("scored")
    bq_put(TEXTS, table, settings=settings)
    response = service.predict(table, output, name, id_columns="text")
    assert response.status_code == 200, response.text
    told = {row["text"]: row["Prediction"] for row in cloud.rows(output)}
    assert told == dict(zip(TEXTS["text"], of_a_frame.predict(TEXTS), strict=True))


def test_a_bucket_that_is_not_there_is_told(
    settings: Settings, name: str, model: LinearRegression
) -> None:
    own = settings.model_copy(update={"gcs_bucket_models_dev": "no-such-bucket"})

    for version in ("next", "v1"):
        with pytest.raises(NotFound, match="gs://no-such-bucket"):
            published_as(own, name, model, version)


OWN_CLASS = """
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
import pandas as pd
import mlsys

def twice(rows):
    return rows * 2

class Mine(LinearRegression):
    pass

rows = pd.DataFrame({"a": [1.0, 2.0]})
for model in (
    make_pipeline(FunctionTransformer(twice), LinearRegression()),
    make_pipeline(FunctionTransformer(lambda rows: rows), LinearRegression()),
    Mine(),
):
    try:
        mlsys.publish_model(model.fit(rows, rows["a"]), "mine", rows=rows)
    except mlsys.MlsysError as error:
        print(error)
"""


def test_what_only_the_notebook_defines_is_told_before_the_service_has_to(
    servers: LocalServers,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWN_CLASS],
        env=process_environment(**servers.env),
        capture_output=True,
        text=True,
        check=True,
    )

    said = done.stdout.splitlines()
    for line, needed in itertools.zip_longest(said, ["twice", "<lambda>", "Mine"]):
        assert line.startswith(f"The model needs {needed}, which only this notebook or script")


def test_a_frame_of_polars_with_nan_and_null_is_asked_again_as_it_was(
    service: Client, cloud: Cloud, settings: Settings, name: str
) -> None:
    rows = pl.DataFrame({"a": [1.0, float("nan"), None], "b": [1.0, float("inf"), 3.0]})
    publish_model(Answers(np.arange(6)), name, rows=rows, settings=settings)
    table, output = cloud.put(pa.Table.from_pandas(ROWS)), cloud.new_table("scored")

    assert service.predict(table, output, name).status_code == 200
    golden = stored(settings, name, "v1")[1]["golden"]
    assert golden["rows"] == [
        {"a": 1.0, "b": 1.0},
        {"a": "NaN", "b": "Infinity"},
        {"a": None, "b": 3.0},
    ]
