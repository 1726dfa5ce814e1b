"""Models are found, loaded once, and kept while there is room."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline

from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    PATIENCE,
    Background,
    ObjectsProxy,
    abandoned,
    assert_nothing_appended,
    assert_problem,
    log_lines,
    numbers,
    request_for,
)


@pytest.fixture(scope="module")
def table(cloud: Cloud) -> str:
    return cloud.put(numbers(3))


@pytest.fixture
def ask(cloud: Cloud, table: str) -> Callable[..., Any]:
    """Has `table` predicted into a table of its own; the status, or the answer of a refusal."""

    def predict(service: Client, model: str, **more: Any) -> Any:
        response = service.predict(table, cloud.new_table(), model, **more)
        return response if response.is_error else response.status_code

    return predict


def predictions(cloud: Cloud, service: Client, table: str, model: str) -> list[float]:
    output = cloud.new_table()
    assert service.predict(table, output, model).status_code == 200
    return [row["Prediction"] for row in cloud.rows(output, order_by="id")]


def test_twenty_that_ask_at_once_get_one_download_and_one_unpickling(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    name = cloud.name()
    model = cloud.publish(models.LoadsSlowly(name))
    service = start_behind(max_runs=20)

    callers = [Background(lambda: ask(service, model, model_version="v1")) for _ in range(20)]
    # Each looks the model and its metadata up, and the first downloads it.
    objects.wait_for("model.pkl", times=21)
    models.event(f"{name} open").set()

    assert [caller.result() for caller in callers] == [200] * 20
    assert models.calls[f"{name} unpickled"] == 1
    assert objects.downloads_of(model) == 1


# A package as scipy has them: its modules import each other, in the order that it begins with.
FIRST = """
from tests.service import models

class First(models.Doubles):
    pass

models.event("{package} entered").set()
models.event("{package} never").wait(0.5)
from {package}.second import Second
"""
SECOND = """
from {package}.first import First

class Second(First):
    pass
"""


def test_two_models_whose_modules_import_each_other_are_loaded_at_once(
    cloud: Cloud,
    service: Client,
    ask: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = cloud.name()
    place = tmp_path / package
    place.mkdir()
    (place / "__init__.py").write_text(f"from {package} import first")
    (place / "first.py").write_text(FIRST.format(package=package))
    (place / "second.py").write_text(SECOND.format(package=package))
    monkeypatch.syspath_prepend(tmp_path)
    first, second = (
        cloud.publish(getattr(import_module(f"{package}.{name}"), name.capitalize())())
        for name in ("first", "second")
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    models.event(f"{package} entered").clear()

    one = Background(lambda: ask(service, first))
    assert models.event(f"{package} entered").wait(PATIENCE)
    other = Background(lambda: ask(service, second))

    assert [one.result(), other.result()] == [200, 200]


def test_a_new_generation_is_noticed_by_the_next_request(
    cloud: Cloud, service: Client, table: str
) -> None:
    model = cloud.publish(models.Times(2))
    first = service.predict(table, cloud.new_table(), model).json()["model"]
    assert predictions(cloud, service, table, model) == [0, 2, 4]

    cloud.publish(models.Times(3), model)

    assert predictions(cloud, service, table, model) == [0, 3, 6]
    second = service.predict(table, cloud.new_table(), model).json()["model"]
    assert second["version"] == first["version"] == "v1"
    assert second["generation"] > first["generation"]


def test_a_caller_who_goes_away_while_the_model_loads_does_not_end_it_for_the_others(
    cloud: Cloud, start_behind: Callable[..., Client], ask: Callable[..., Any], table: str
) -> None:
    name = cloud.name()
    model = cloud.publish(models.LoadsSlowly(name))
    service = start_behind()
    output, gone = cloud.new_table(), cloud.name("gone")

    with log_lines() as log:
        with abandoned(service, request_for(table, output, model, run_id=gone)):
            assert models.event(f"{name} loading").wait(10)
            other = Background(lambda: ask(service, model))
        log.wait_for("run ended", run_id=gone)
    models.event(f"{name} open").set()

    assert other.result() == 200
    assert models.calls[f"{name} unpickled"] == 1
    assert_nothing_appended(cloud, output)


def test_the_least_recently_used_model_makes_room(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    service = start_behind(model_cache_bytes=25_000)
    first, second, third = (cloud.publish(models.Times(1, size=10_000)) for _ in range(3))

    for model in (first, second, first, third, first, second):
        assert ask(service, model) == 200

    assert [objects.downloads_of(model) for model in (first, second, third)] == [1, 2, 1]


def test_a_model_larger_than_the_cache_predicts_and_drives_nobody_out(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    service = start_behind(model_cache_bytes=25_000)
    small, large = cloud.publish(models.Times(1)), cloud.publish(models.Times(1, size=50_000))

    for model in (small, large, large, small):
        assert ask(service, model) == 200

    assert (objects.downloads_of(small), objects.downloads_of(large)) == (1, 2)


def test_a_model_that_fails_to_load_leaves_the_cache_as_it_was(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    service = start_behind()
    good = cloud.publish(models.Times(2))
    bad = cloud.publish(models.fails_to_load("ValueError", "no"))

    assert ask(service, good) == 200
    assert_problem(ask(service, bad), 500, "can't be unpickled")
    assert_problem(ask(service, bad), 500, "can't be unpickled")
    assert ask(service, good) == 200
    assert objects.downloads_of(good) == 1

    cloud.publish(models.Times(3), bad)
    assert ask(service, bad) == 200


def test_everyone_who_waits_for_a_model_that_fails_is_told(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    model = cloud.publish({"no": "model"})
    service = start_behind(max_runs=5)

    callers = [Background(lambda: ask(service, model)) for _ in range(5)]

    for caller in callers:
        assert_problem(caller.result(), 500)


def test_a_damaged_download_is_not_loaded(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    name = cloud.name()
    model = cloud.publish(models.Counted(name))
    service = start_behind()

    objects.damage = lambda data: bytes([data[0] ^ 1]) + data[1:]
    response = ask(service, model)
    assert_problem(response, 503, f"{model}/v1/model.pkl", "Try again")
    assert int(response.headers["Retry-After"]) >= 1
    assert models.calls[f"{name} unpickled"] == 0

    objects.damage = bytes
    assert ask(service, model) == 200
    assert models.calls[f"{name} unpickled"] == 1


def test_a_download_cut_short_is_not_loaded(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    model = cloud.publish(models.Times(2))
    objects.damage = lambda data: data[:-1]

    assert_problem(ask(start_behind(), model), 503, "Try again")


def test_damaged_metadata_is_not_read(
    cloud: Cloud,
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    ask: Callable[..., Any],
) -> None:
    model = cloud.publish(models.Times(2), target="survived")
    objects.damage = lambda data: data.replace(b"survived", b"deceased")

    assert_problem(ask(start_behind(), model), 503, "metadata.json", "Try again")


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("xz", 3)])
def test_what_joblib_dumped_is_loaded_too(
    cloud: Cloud, service: Client, table: str, compress: Any
) -> None:
    rows = numbers(3).select(["x"]).to_pandas()
    dumped = io.BytesIO()
    joblib.dump(LinearRegression().fit(rows, rows["x"] * 2), dumped, compress=compress)
    model = cloud.name("model").replace("_", "-")
    cloud.upload(f"{model}/v1/model.pkl", dumped.getvalue())

    np.testing.assert_allclose(predictions(cloud, service, table, model), [0, 2, 4], atol=1e-12)


def test_latest_is_the_highest_version_that_is_one(
    cloud: Cloud, service: Client, table: str
) -> None:
    model = cloud.publish(models.Times(9), version="v9")
    cloud.publish(models.Times(10), model, version="v10")
    cloud.publish(models.Times(99), f"{model}-other", version="v99")
    broken = b"not a model"
    for stray in (
        "v11/notes.txt",
        "v11/model.pkl.bak",
        "v11/model.PKL",
        "v12/deep/model.pkl",
        "v012/model.pkl",
        "v0/model.pkl",
        "v-1/model.pkl",
        "v1.5/model.pkl",
        "v٣/model.pkl",
        "vlatest/model.pkl",
        "v/model.pkl",
        "v13",
        "v14/",
        "v9999999999/model.pkl",
        "model.pkl",
    ):
        cloud.upload(f"{model}/{stray}", broken)
    output = cloud.new_table()

    response = service.predict(table, output, model)

    assert response.status_code == 200, response.text
    assert response.json()["model"]["version"] == "v10"
    assert {(row["ModelVersion"], row["Prediction"] / 10) for row in cloud.rows(output)} == {
        ("v10", 0.0),
        ("v10", 1.0),
        ("v10", 2.0),
    }


def test_an_older_version_predicts_where_it_is_asked_for(
    cloud: Cloud, service: Client, table: str
) -> None:
    model = cloud.publish(models.Times(1), version="v1")
    cloud.publish(models.Times(2), model, version="v2")

    response = service.predict(table, cloud.new_table(), model, model_version="v1")

    assert response.json()["model"]["uri"] == f"gs://mlsys-models-dev/{model}/v1/model.pkl"


def test_a_version_without_its_model_file_is_missing(
    cloud: Cloud, service: Client, table: str
) -> None:
    model = cloud.name("model").replace("_", "-")
    cloud.upload(f"{model}/v1/metadata.json", b"{}")

    for version in ("v1", "latest"):
        response = service.predict(table, cloud.new_table(), model, model_version=version)
        assert_problem(response, 404, model)


def test_metadata_names_what_the_model_itself_does_not_know(cloud: Cloud, service: Client) -> None:
    model = cloud.publish(
        LinearRegression().fit([[1.0, 0.0], [2.0, 1.0]], [1.0, 2.0]),
        features=["x", {"name": "y", "type": "FLOAT64"}],
        id_columns=["id"],
        target="cost",
        anything_else={"a": [1]},
    )
    table = cloud.put(numbers(3, y=[0.0, 0.0, 0.0], word=["a", "b", "c"]))
    output = cloud.new_table()

    response = service.predict(table, output, model)

    assert response.status_code == 200, response.text
    assert list(cloud.columns(output))[:2] == ["id", "cost"]
    assert "word" not in cloud.columns(output)


def test_a_large_model_is_loaded_whole(cloud: Cloud, service: Client, table: str) -> None:
    model = cloud.publish(models.Times(2, size=20_000_000))

    assert predictions(cloud, service, table, model) == [0, 2, 4]


def test_a_model_that_takes_column_names_for_rows_is_refused_though_it_agrees_with_itself(
    cloud: Cloud, service: Client, table: str
) -> None:
    texts = ["good", "bad", "good one", "bad one"]
    estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [1, 0, 1, 0])
    [answer] = estimator.predict(["x"]).tolist()
    model = cloud.publish(
        estimator,
        features=[{"name": "x", "type": "STRING"}],
        frame="pandas",
        golden={"rows": [{"x": text} for text in texts], "predictions": [answer]},
    )
    response = service.predict(table, cloud.new_table(), model)

    problem = assert_problem(response, 500, model, "1 answers for 4 rows", "ColumnTransformer")
    assert problem["type"] == "urn:mlsys:model-unusable"


def test_a_target_that_no_column_can_be_named_by_is_refused_before_a_table_is_made(
    cloud: Cloud, service: Client, table: str
) -> None:
    model, output = cloud.publish(models.Doubles(), target="price ($)"), cloud.new_table()

    response = service.predict(table, output, model)

    problem = assert_problem(response, 500, "'price ($)'", "metadata.json")
    assert problem["type"] == "urn:mlsys:model-unusable"
    assert not cloud.exists(output)


def test_a_model_is_asked_again_by_golden_rows_that_are_new(
    service: Client, cloud: Cloud, ask: Callable[..., Any]
) -> None:
    told = {"features": [{"name": "x", "type": "FLOAT64"}], "frame": "pandas"}
    right = told | {"golden": {"rows": [{"x": 1.0}], "predictions": [2.0]}}
    wrong = told | {"golden": {"rows": [{"x": 1.0}], "predictions": [3.0]}}
    model = cloud.publish(models.Doubles(), **right)
    assert ask(service, model) == 200

    cloud.upload(f"{model}/v1/metadata.json", json.dumps(wrong).encode())
    assert_problem(ask(service, model), 500, "answers otherwise here than where it was trained")

    cloud.upload(f"{model}/v1/metadata.json", json.dumps(right).encode())
    assert ask(service, model) == 200
