"""What the service answers, as JSON and as events, and what it does when a caller goes away."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import httpx2
import pytest
from fastapi.openapi.models import OpenAPI

from mlsys.local import LocalServers
from service.contract import PredictResult, ProgressEvent
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    Background,
    RowsProxy,
    ServiceProcess,
    abandoned,
    assert_nothing_appended,
    assert_problem,
    assert_problem_body,
    log_lines,
    numbers,
    process_environment,
    request_for,
    service_process,
)

EVENTS = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def table(cloud: Cloud) -> str:
    return cloud.put(numbers(1000))


def entered(name: str) -> None:
    """Waits until the gated model is given rows."""
    assert models.event(f"{name} entered").wait(10)


def events_of(service: Client, wanted: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    with service.sse("/predict", params=wanted) as source:
        assert source.response.status_code == 200, source.response.read()
        return [(event.event, json.loads(event.data)) for event in source]


def test_the_result_tells_all_there_is_to_know_of_a_run(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    output = cloud.new_table()

    response = service.predict(table, output, doubles, run_id="nightly-7")

    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    result = response.json()
    assert result["status"] == "succeeded"
    assert "1,000 rows predicted" in result["message"]
    assert result["run_id"] == "nightly-7"
    assert result["rows"] == cloud.count(output) == 1000
    assert (result["input_table"], result["output_table"]) == (table, output)
    assert result["model"]["name"] == doubles
    assert result["model"]["version"] == "v1"
    assert result["model"]["uri"] == f"gs://mlsys-models-dev/{doubles}/v1/model.pkl"
    assert result["model"]["generation"] > 0
    start, end = (datetime.fromisoformat(result[name]) for name in ("started_at", "ended_at"))
    assert start.utcoffset().total_seconds() == end.utcoffset().total_seconds() == 0
    assert (end - start).total_seconds() == pytest.approx(result["seconds"], abs=0.1)
    assert result["rows_per_second"] == pytest.approx(1000 / result["seconds"], rel=0.1)
    assert result["peak_memory_bytes"] > 50_000_000
    [stamp] = {row["PredictionTimestamp"] for row in cloud.rows(output)}
    assert start <= stamp <= end


def test_a_run_without_a_name_gets_one_of_its_own(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    names = {service.predict(table, cloud.new_table(), doubles).json()["run_id"] for _ in range(2)}

    assert len(names) == 2
    assert all(len(name) == 32 and name.isalnum() for name in names)


def test_post_does_what_get_does(service: Client, cloud: Cloud, table: str, doubles: str) -> None:
    by_get, by_post = cloud.new_table(), cloud.new_table()
    more = {"id_columns": ["id"], "where": "id < 10", "chunk_rows": 3, "model_version": "v1"}

    got = service.predict(table, by_get, doubles, **more)
    posted = service.post("/predict", json=request_for(table, by_post, doubles, **more))

    assert got.status_code == posted.status_code == 200
    assert got.json().keys() == posted.json().keys()
    assert got.json()["rows"] == posted.json()["rows"] == 10
    columns = "id, Prediction, ModelName, ModelVersion"
    rows = [
        [dict(row) for row in cloud.query(f"SELECT {columns} FROM `{output}` ORDER BY id")]
        for output in (by_get, by_post)
    ]
    assert rows[0] == rows[1]
    assert [row["Prediction"] for row in rows[0]] == [2.0 * number for number in range(10)]


def test_a_table_without_rows_is_predicted(service: Client, cloud: Cloud, doubles: str) -> None:
    table, output = cloud.new_table(), cloud.new_table()
    cloud.query(f"CREATE TABLE `{table}` (id INT64, x FLOAT64)")

    response = service.predict(table, output, doubles)

    assert response.json()["rows"] == 0
    assert cloud.count(output) == 0


def test_events_tell_the_progress_and_then_the_result_once(
    service: Client, cloud: Cloud, doubles: str
) -> None:
    table, output = cloud.put(numbers(100_000)), cloud.new_table()

    with log_lines() as log:
        events = events_of(service, request_for(table, output, doubles, chunk_rows=1000))
        log.wait_for("GET /predict 200")

    assert "run succeeded" in log.seen
    assert "run told to end" not in log.seen
    names = [name for name, _ in events]
    assert names == ["progress"] * (len(events) - 1) + ["result"]
    steps = [step for name, step in events if name == "progress"]
    done = [step["rows_done"] for step in steps]
    assert done == sorted(done)
    assert len(set(done)) > 1
    assert done[-1] == 100_000
    assert {step["rows_total"] for step in steps} == {100_000}
    assert steps[-1]["seconds_left"] == 0
    assert events[-1][1]["rows"] == cloud.count(output) == 100_000


def test_how_many_rows_pass_a_filter_is_not_known_before(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    wanted = request_for(table, cloud.new_table(), doubles, where="id < 100")

    events = events_of(service, wanted)

    steps = [step for name, step in events if name == "progress"]
    assert {step["rows_total"] for step in steps} == {None}
    assert {step["seconds_left"] for step in steps} == {None}
    assert steps[-1]["rows_done"] == events[-1][1]["rows"] == 100


def test_events_come_while_the_run_goes_on(
    service: Client, cloud: Cloud, table: str, gate: str
) -> None:
    wanted = request_for(table, cloud.new_table(), gate)

    with service.sse("/predict", params=wanted) as source:
        assert source.response.headers["Content-Type"].startswith("text/event-stream")
        assert source.response.headers["Cache-Control"] == "no-store"
        events = iter(source)
        first, second = (json.loads(next(events).data) for _ in range(2))
        entered(gate)
        models.event(f"{gate} open").set()
        last = list(events)[-1]

    assert first["rows_done"] == second["rows_done"] == 0
    assert (last.event, json.loads(last.data)["rows"]) == ("result", 1000)


def test_events_are_to_be_had_from_a_post_too(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    wanted = request_for(table, cloud.new_table(), doubles)

    with service.sse("/predict", method="POST", json=wanted) as source:
        assert list(source)[-1].event == "result"


def test_an_error_in_the_midst_of_a_run_is_an_event_with_the_problem(
    service: Client, cloud: Cloud
) -> None:
    halfway = cloud.name("halfway")
    table, output = cloud.put(numbers(100_000)), cloud.new_table()
    wanted = request_for(table, output, cloud.publish(models.RaisesAt(99_999)), run_id=halfway)

    events = events_of(service, wanted)

    assert [name for name, _ in events if name != "progress"] == ["error"]
    name, problem = events[-1]
    assert name == "error"
    assert_problem_body(problem, 500, "ValueError", "Nothing was written")
    assert problem["instance"] == f"/runs/{halfway}"
    assert problem["row"] is not None
    assert cloud.count(output) == 0


def test_an_error_before_the_start_is_a_status(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    output = cloud.new_table()
    wanted = request_for(table, output, doubles)

    for status, change in {404: {"model_name": "nobody"}, 422: {"id_columns": "nope"}}.items():
        response = service.get("/predict", params=wanted | change, headers=EVENTS)
        assert_problem(response, status)
    assert_nothing_appended(cloud, output)


def test_a_filter_that_is_refused_is_a_problem_and_no_event(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    output = cloud.new_table()

    wanted = request_for(table, output, doubles, where="nope = 1")

    assert_problem(service.get("/predict", params=wanted, headers=EVENTS), 400, "where")
    assert_nothing_appended(cloud, output)


def test_a_name_in_use_by_a_run_under_way_is_a_conflict(
    service: Client, cloud: Cloud, table: str, gate: str
) -> None:
    wanted = request_for(table, cloud.new_table(), gate, run_id="the-one")
    first = Background(lambda: service.get("/predict", params=wanted))
    entered(gate)

    assert_problem(service.get("/predict", params=wanted), 409, "the-one", "Ask for it again")

    models.event(f"{gate} open").set()
    assert first.result().status_code == 200
    assert service.get("/predict", params=wanted).status_code == 200


def test_more_runs_than_may_be_are_sent_away_for_a_while(
    start_service: Callable[..., Client], cloud: Cloud, table: str, doubles: str, gate: str
) -> None:
    service = start_service(max_runs=1)
    first = Background(lambda: service.predict(table, cloud.new_table(), gate))
    entered(gate)
    output = cloud.new_table()

    for headers in ({}, EVENTS):
        response = service.get(
            "/predict", params=request_for(table, output, doubles), headers=headers
        )
        assert_problem(response, 429, "1 runs under way", "Try again later")
        assert int(response.headers["Retry-After"]) >= 1
    assert_nothing_appended(cloud, output)

    models.event(f"{gate} open").set()
    assert first.result().status_code == 200
    assert service.predict(table, output, doubles).status_code == 200


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_caller_who_goes_away_while_rows_are_predicted_ends_the_run(
    start_service: Callable[..., Client],
    cloud: Cloud,
    table: str,
    doubles: str,
    gate: str,
    accept: str,
) -> None:
    gone = cloud.name("gone")
    service = start_service(max_runs=1, predict_threads=2)
    output = cloud.new_table()

    with log_lines() as log:
        with abandoned(service, request_for(table, output, gate, run_id=gone), accept):
            entered(gate)
        log.wait_for("run ended", run_id=gone)
        if "event" not in accept:
            log.wait_for("GET /predict 499", run_id=gone, level="info")

    # The model still has its rows, and yet there is room for the next run.
    assert service.predict(table, cloud.new_table(), doubles).status_code == 200
    models.event(f"{gate} open").set()
    assert service.predict(table, cloud.new_table(), gate).status_code == 200
    assert cloud.count(output) == 0


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_caller_who_goes_away_before_rows_are_predicted_ends_the_run(
    start_service: Callable[..., Client], cloud: Cloud, table: str, doubles: str, accept: str
) -> None:
    gone = cloud.name("gone")
    service = start_service(max_runs=1)
    name, output = cloud.name(), cloud.new_table()
    model = cloud.publish(models.Gated(name, sample=True))

    with log_lines() as log:
        with abandoned(service, request_for(table, output, model, run_id=gone), accept):
            entered(name)
        log.wait_for("run ended", run_id=gone)

    assert service.predict(table, cloud.new_table(), doubles).status_code == 200
    models.event(f"{name} open").set()
    assert_nothing_appended(cloud, output)


def test_a_caller_of_a_post_who_goes_away_ends_the_run(
    start_service: Callable[..., Client], cloud: Cloud, table: str, gate: str
) -> None:
    gone = cloud.name("gone")
    service = start_service(max_runs=1)
    output = cloud.new_table()
    wanted = request_for(table, output, gate, run_id=gone)

    with log_lines() as log:
        with service.sse("/predict", method="POST", json=wanted) as source:
            events = iter(source)
            next(events)
            entered(gate)
        log.wait_for("run ended", run_id=gone)

    assert cloud.count(output) == 0


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_commit_that_has_begun_is_seen_through(
    start_behind: Callable[..., Client],
    rows: RowsProxy,
    cloud: Cloud,
    table: str,
    doubles: str,
    accept: str,
) -> None:
    gone = cloud.name("gone")
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(10)

    rows.before["BatchCommitWriteStreams"] = hold
    service = start_behind()
    output = cloud.new_table()

    with log_lines() as log:
        with abandoned(service, request_for(table, output, doubles, run_id=gone), accept):
            assert begun.wait(10)
        log.wait_for("run told to end", run_id=gone, because="the caller went away")
        go_on.set()
        log.wait_for("run succeeded", run_id=gone)

    assert cloud.count(output) == 1000


def test_a_caller_who_goes_away_before_the_commit_leaves_nothing(
    start_behind: Callable[..., Client], rows: RowsProxy, cloud: Cloud, table: str, doubles: str
) -> None:
    gone = cloud.name("gone")
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(10)

    rows.before["FinalizeWriteStream"] = hold
    service = start_behind()
    output = cloud.new_table()

    with log_lines() as log:
        with abandoned(service, request_for(table, output, doubles, run_id=gone)):
            assert begun.wait(10)
        log.wait_for("run ended", run_id=gone)
    go_on.set()

    assert cloud.count(output) == 0


def held(service: Client, wanted: dict[str, Any], *prefer: str) -> httpx2.Response:
    """What is answered before the end: the model is gated, and let go once there is an answer."""
    headers = [("Prefer", line) for line in prefer]
    with log_lines() as log:
        response = service.get("/predict", params=wanted, headers=headers, timeout=10)
        models.event(f"{wanted['model_name']} open").set()
        log.wait_for("run succeeded", run_id=wanted["run_id"])
    return response


@pytest.mark.parametrize(
    "prefer",
    [
        ("Respond-Async",),
        ("wait=10", "respond-async"),
        ("respond-async", "wait=10"),
        ("wait=10 ,RESPOND-ASYNC; how=soon", "handling=lenient"),
    ],
)
def test_a_preference_counts_in_any_case_and_on_any_line(
    service: Client, cloud: Cloud, table: str, gate: str, prefer: tuple[str, ...]
) -> None:
    wanted = request_for(table, cloud.new_table(), gate, run_id=cloud.name("run"))

    response = held(service, wanted, *prefer)

    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "respond-async"


def test_a_preference_that_only_contains_the_word_is_another_one(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    wanted = request_for(table, cloud.new_table(), doubles)

    response = service.get("/predict", params=wanted, headers={"Prefer": "no-respond-async, a=b"})

    assert (response.status_code, response.json()["rows"]) == (200, 1000)


def test_the_location_of_a_run_is_not_that_of_another_environments(
    service: Client, cloud: Cloud, table: str, doubles: str, gate: str
) -> None:
    run_id = cloud.name("run")
    cloud.publish(models.Gated(gate), gate, env="staging")
    wanted = request_for(table, cloud.new_table(), gate, run_id=run_id, env="staging")
    service.predict(table, cloud.new_table(), doubles, run_id=run_id)

    run = service.get(held(service, wanted, "respond-async").headers["Location"]).json()

    assert (run["run_id"], run["request"]["env"]) == (run_id, "staging")


def test_the_runs_are_by_default_those_of_the_deployment(
    service: Client, start_service: Callable[..., Client], cloud: Cloud, table: str
) -> None:
    own, run_id = start_service(mlsys_env="staging"), cloud.name("run")
    model = cloud.publish(models.Doubles(), env="staging")
    own.predict(table, cloud.new_table(), model, run_id=run_id, env="staging")

    runs = own.get("/runs", params={"limit": 1}).json()["runs"]

    assert [run["run_id"] for run in runs] == [run_id]
    assert_problem(own.get("/runs", params={"env": "dev"}), 403, "env=staging only")
    assert_problem(service.get("/runs"), 400, "env: is required", "Name dev, staging or prod")


@pytest.mark.parametrize(
    "name", ["env", "input_table", "model_name", "run_id", "where", "chunk_rows"]
)
def test_a_parameter_that_is_given_twice_is_refused(
    service: Client, cloud: Cloud, table: str, doubles: str, name: str
) -> None:
    output = cloud.new_table()
    more = {"run_id": cloud.name("run"), "where": "id < 5", "chunk_rows": 10}
    wanted = request_for(table, output, doubles, **more)

    response = service.get("/predict", params=wanted | {name: [wanted[name]] * 2})

    assert_problem(response, 400, f"{name}: is given more than once. Give it once")
    assert_nothing_appended(cloud, output)


@pytest.mark.parametrize("path", ["/runs", "/runs/nightly-7", "/model-registry"])
def test_of_two_environments_none_is_taken(service: Client, path: str) -> None:
    response = service.get(path, params={"env": ["prod", "dev"]})

    assert_problem(response, 400, "env: is given more than once")


def test_id_columns_may_be_given_several_times(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    output = cloud.new_table()

    response = service.predict(table, output, doubles, id_columns=["x", "id"])

    assert response.status_code == 200, response.text
    assert list(cloud.columns(output))[:2] == ["x", "id"]


@pytest.mark.parametrize("blank", ["", " ", "\t\n", "\u00a0"])
def test_a_blank_filter_is_not_taken_for_none(
    service: Client, cloud: Cloud, table: str, doubles: str, blank: str
) -> None:
    output = cloud.new_table()
    wanted = request_for(table, output, doubles, where=blank)

    for response in (service.get("/predict", params=wanted), service.post("/predict", json=wanted)):
        assert_problem(response, 400, "where: is blank", "leave it out")
    assert_nothing_appended(cloud, output)


def test_health_and_the_root_answer_without_the_cloud(
    start_service: Callable[..., Client],
) -> None:
    nowhere = "127.0.0.1:1"
    service = start_service(
        bigquery_emulator_host=f"http://{nowhere}",
        bigquery_storage_emulator_host=nowhere,
        storage_emulator_host=f"http://{nowhere}",
    )

    assert service.get("/health").json() == {"status": "ok"}
    about = service.get("/").json()
    assert about["service"] == "mlsys"
    assert about["version"]
    assert service.get(about["documentation"]).status_code == 200


def test_the_openapi_document_tells_what_is_answered(service: Client) -> None:
    document = service.get("/openapi.json").json()

    OpenAPI.model_validate(document)
    assert {"/", "/health", "/predict"} <= set(document["paths"])
    assert "HTTPValidationError" not in json.dumps(document)
    for method in ("get", "post"):
        operation = document["paths"]["/predict"][method]
        answers = operation["responses"]
        problems = {"400", "403", "404", "409", "422", "429", "500", "503"}
        assert set(answers) == {"200", "202"} | problems
        assert set(answers.pop("200")["content"]) == {"application/json", "text/event-stream"}
        assert set(answers.pop("202")["content"]) == {"application/json"}
        for status, answer in answers.items():
            [(media_type, content)] = answer["content"].items()
            assert media_type == "application/problem+json"
            assert_problem_body(content["example"], int(status))
            assert set(content["schema"]["required"]) == {"type", "title", "status", "detail"}
    parameters = document["paths"]["/predict"]["get"]["parameters"]
    required = {each["name"] for each in parameters if each["required"]}
    assert required == {"env", "input_table", "output_table", "model_name", "model_version"}
    for each in parameters:
        if each["name"] in required:
            assert each["schema"]["examples"], each["name"]
    schemas = document["components"]["schemas"]
    for wire in (PredictResult, ProgressEvent):
        [example] = schemas[wire.__name__]["examples"]
        assert wire.model_validate(example).model_dump(mode="json").keys() == example.keys()
    schema = schemas["PredictRequest"]
    assert set(schema["properties"]) == {each["name"] for each in parameters} - {"accept", "prefer"}


@pytest.fixture(scope="module")
def process(servers: LocalServers) -> Iterator[ServiceProcess]:
    """A service with an interpreter of its own, which it does not share with the test."""
    with service_process(process_environment(**servers.env, READ_STREAMS="4")) as running:
        yield running


@pytest.mark.parametrize("model", [models.NumpyHeavy(), models.PythonHeavy()])
def test_health_is_answered_at_once_while_models_keep_the_machine_busy(
    process: ServiceProcess, cloud: Cloud, model: models.Doubles, capsys: pytest.CaptureFixture
) -> None:
    table, output = cloud.put(numbers(400_000)), cloud.new_table()
    wanted = request_for(table, output, cloud.publish(model), chunk_rows=1000)
    with (
        httpx2.Client(base_url=process.url, timeout=60) as caller,
        httpx2.Client(base_url=process.url, timeout=60) as watcher,
        caller.sse("/predict", params=wanted) as source,
    ):
        events = iter(source)
        while json.loads(next(events).data)["rows_done"] == 0:
            pass  # An event every half second, until the first predictions are in.
        waited = [_seconds(lambda: watcher.get("/health").raise_for_status()) for _ in range(50)]
        assert next(events).event == "progress"

    started = process.wait_for_line("run started")
    assert json.loads(started)["streams"] == 4
    median, worst = statistics.median(waited), max(waited)
    with capsys.disabled():
        cuts = statistics.quantiles(waited, n=20)
        print(
            f"\n/health beside {type(model).__name__}: median {median * 1000:.1f} ms, "
            f"95% {cuts[18] * 1000:.1f} ms, worst {worst * 1000:.1f} ms"
        )
    assert median < 0.05
    assert_nothing_appended(cloud, output)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
