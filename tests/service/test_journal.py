"""Runs and their journal over HTTP: told again, taken over, refused, listed."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import grpc
import httpx2
import pytest

from service.contract import PredictRequest
from service.engine import predict_here
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    PATIENCE,
    Background,
    ObjectsProxy,
    RefusedCall,
    RowsProxy,
    abandoned,
    assert_problem,
    log_lines,
    numbers,
    request_for,
)

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(scope="module")
def table(cloud: Cloud) -> str:
    return cloud.put(numbers(100))


@pytest.fixture
def wanted(cloud: Cloud, table: str, doubles: str) -> dict[str, Any]:
    return request_for(table, cloud.new_table(), doubles, run_id=cloud.name("run"))


def run_of(service: Client, wanted: dict[str, Any]) -> dict[str, Any]:
    response = service.get(f"/runs/{wanted['run_id']}")
    assert response.status_code == 200, response.text
    return response.json()


def record_of(cloud: Cloud, wanted: dict[str, Any]) -> dict[str, Any]:
    """The record of a run, as it is stored."""
    path = f"runs/{wanted['run_id']}.json"
    data = cloud.portal.call(cloud.clients.objects.download, "mlsys-runs-dev", path)
    return json.loads(data)


def store(cloud: Cloud, wanted: dict[str, Any], record: bytes) -> None:
    upload = cloud.clients.objects.upload
    path = f"runs/{wanted['run_id']}.json"
    cloud.portal.call(
        lambda: upload("mlsys-runs-dev", path, record, content_type="application/json")
    )


def with_own_journal(start_service: Callable[..., Client], cloud: Cloud) -> tuple[Client, str]:
    """A service with a bucket of its own for its runs, and that bucket."""
    bucket = cloud.name("runs").replace("_", "-")
    create = f"{cloud.settings.storage_emulator_host}/storage/v1/b"
    service = start_service(gcs_bucket_runs_dev=bucket)
    service.post(create, json={"name": bucket}).raise_for_status()
    return service, bucket


# A run id that is used again


def test_a_call_that_is_repeated_is_told_the_same_and_writes_nothing(
    service: Client, cloud: Cloud, wanted: dict[str, Any]
) -> None:
    first = service.get("/predict", params=wanted)
    again = service.get("/predict", params=wanted)
    posted = service.post("/predict", json=wanted)

    assert first.status_code == 200, first.text
    assert again.json() == first.json() == posted.json()
    assert cloud.count(wanted["output_table"]) == 100


def test_a_follower_of_events_is_told_the_stored_result(
    service: Client, wanted: dict[str, Any]
) -> None:
    first = service.get("/predict", params=wanted).json()

    with service.sse("/predict", params=wanted) as source:
        *_, last = source

    assert last.event == "result"
    assert json.loads(last.data) == first


def test_a_run_id_with_other_parameters_is_refused(
    service: Client, cloud: Cloud, wanted: dict[str, Any]
) -> None:
    assert service.get("/predict", params=wanted).status_code == 200

    for change in ({"where": "id < 3"}, {"chunk_rows": 7}, {"output_table": cloud.new_table()}):
        response = service.get("/predict", params=wanted | change)
        assert_problem(response, 422, wanted["run_id"], "another run_id")
    assert cloud.count(wanted["output_table"]) == 100


def test_a_run_under_way_elsewhere_is_a_conflict_that_says_when_to_ask_again(
    service: Client,
    start_service: Callable[..., Client],
    cloud: Cloud,
    table: str,
    gate: str,
) -> None:
    wanted = request_for(table, cloud.new_table(), gate, run_id=cloud.name("run"))
    elsewhere = start_service()
    first = Background(lambda: elsewhere.get("/predict", params=wanted))
    assert models.event(f"{gate} entered").wait(PATIENCE)

    response = service.get("/predict", params=wanted)
    assert run_of(service, wanted)["state"] == "running"
    models.event(f"{gate} open").set()

    assert_problem(response, 409, wanted["run_id"], "Ask for it again")
    assert 1 <= int(response.headers["Retry-After"]) <= 30
    assert first.result().status_code == 200
    assert cloud.count(wanted["output_table"]) == 100


def test_a_run_that_failed_may_be_called_again(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    name = cloud.publish(models.RaisesAt(50))
    wanted = request_for(table, cloud.new_table(), name, run_id=cloud.name("run"))

    assert_problem(service.get("/predict", params=wanted), 500, "ValueError")
    failed = run_of(service, wanted)
    cloud.publish(models.Doubles(), name)
    again = service.get("/predict", params=wanted)

    assert (failed["state"], failed["error"]["status"]) == ("failed", 500)
    assert again.status_code == 200, again.text
    assert cloud.count(wanted["output_table"]) == 100
    assert (run_of(service, wanted)["state"], run_of(service, wanted)["attempts"]) == (
        "committed",
        2,
    )


def test_a_caller_who_went_away_finds_the_run_id_free(
    service: Client, cloud: Cloud, table: str, gate: str
) -> None:
    wanted = request_for(table, cloud.new_table(), gate, run_id=cloud.name("run"))
    with log_lines() as log:
        with abandoned(service, wanted):
            assert models.event(f"{gate} entered").wait(PATIENCE)
        log.wait_for("run ended", run_id=wanted["run_id"])
    models.event(f"{gate} open").set()

    assert service.get("/predict", params=wanted).status_code == 200
    assert cloud.count(wanted["output_table"]) == 100


@pytest.mark.parametrize("state", ["running", "prepared"])
def test_a_run_whose_owner_is_gone_is_taken_over_with_the_same_pins(
    service: Client, cloud: Cloud, wanted: dict[str, Any], state: str
) -> None:
    first = service.get("/predict", params=wanted).json()
    record = record_of(cloud, wanted)
    # As an owner leaves it who dies before the commit, or before he has noted that it is done.
    left = record | {"state": state, "lease_until": datetime.now(UTC).isoformat()}
    del left["result"]
    if state == "running":
        del left["streams"], left["rows"]
        cloud.query(f"DELETE FROM `{wanted['output_table']}` WHERE TRUE")
    over = {"lease_until": datetime.now(UTC).isoformat()}
    store(cloud, wanted, json.dumps(record | over).encode())
    assert not run_of(service, wanted)["abandoned"]
    store(cloud, wanted, json.dumps(left).encode())
    assert run_of(service, wanted)["abandoned"]

    again = service.get("/predict", params=wanted)

    assert again.status_code == 200, again.text
    assert not run_of(service, wanted)["abandoned"]
    assert again.json()["model"] == first["model"]
    assert cloud.count(wanted["output_table"]) == 100
    now = record_of(cloud, wanted)
    assert (now["state"], now["pins"], now["epoch"]) == ("committed", record["pins"], 2)
    assert now["rows_done"] == 100


def test_the_command_waits_for_the_lease_of_a_try_that_was_killed(
    service: Client, cloud: Cloud, wanted: dict[str, Any]
) -> None:
    assert service.get("/predict", params=wanted).status_code == 200
    cloud.query(f"DELETE FROM `{wanted['output_table']}` WHERE TRUE")
    until = datetime.now(UTC) + timedelta(seconds=3)
    left = record_of(cloud, wanted) | {"state": "running", "lease_until": until.isoformat()}
    del left["result"], left["streams"], left["rows"]
    store(cloud, wanted, json.dumps(left).encode())

    request = PredictRequest(**wanted)
    result = anyio.run(predict_here, cloud.settings, request, lambda progress: None)

    assert result.ended_at > until
    assert cloud.count(wanted["output_table"]) == 100


def test_a_model_that_was_replaced_is_not_what_a_taken_over_run_predicts_with(
    start_service: Callable[..., Client], cloud: Cloud, table: str
) -> None:
    bucket = cloud.name("models").replace("_", "-")
    buckets = f"{cloud.settings.storage_emulator_host}/storage/v1/b"
    versioned = {"name": bucket, "versioning": {"enabled": True}}
    httpx2.post(buckets, json=versioned).raise_for_status()
    own = replace(
        cloud, settings=cloud.settings.model_copy(update={"gcs_bucket_models_dev": bucket})
    )
    name = own.publish(models.Doubles(), features=["x"], target="told")
    wanted = request_for(table, cloud.new_table(), name, run_id=cloud.name("run"))
    before = start_service(gcs_bucket_models_dev=bucket)
    assert before.get("/predict", params=wanted).status_code == 200
    record = record_of(cloud, wanted)
    left = record | {"state": "running", "lease_until": datetime.now(UTC).isoformat()}
    store(cloud, wanted, json.dumps(left).encode())
    cloud.query(f"DELETE FROM `{wanted['output_table']}` WHERE TRUE")
    own.publish(models.RaisesAt(0), name, features=["y"], target="another")

    again = start_service(gcs_bucket_models_dev=bucket).get("/predict", params=wanted)

    assert again.status_code == 200, again.text
    assert again.json()["model"]["generation"] == record["pins"]["model"]["generation"]
    assert "told" in cloud.rows(wanted["output_table"])[0]


def test_a_lease_whose_renewal_hangs_is_renewed_again_and_holds_nothing_up(
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    cloud: Cloud,
    table: str,
    gate: str,
) -> None:
    wanted = request_for(table, cloud.new_table(), gate, run_id=cloud.name("run"))
    renewals: queue.SimpleQueue[None] = queue.SimpleQueue()
    hung, let_go = threading.Event(), threading.Event()

    def hang(sent: bytes) -> None:
        if wanted["run_id"].encode() in sent and b'"state":"running"' in sent:
            if models.event(f"{gate} entered").is_set() and not hung.is_set():
                hung.set()
                let_go.wait(10 * PATIENCE)
            renewals.put(None)

    objects.hold = hang
    service = start_behind(lease_seconds=3)
    caller = Background(lambda: service.get("/predict", params=wanted))
    try:
        assert hung.wait(PATIENCE)
        while not renewals.empty():
            renewals.get()
        renewals.get(timeout=PATIENCE)
        models.event(f"{gate} open").set()
        response = caller.result()
    finally:
        let_go.set()

    assert response.status_code == 200, response.text
    assert record_of(cloud, wanted)["epoch"] == 1
    assert cloud.count(wanted["output_table"]) == 100


def test_an_object_that_is_no_record_is_told(
    service: Client, cloud: Cloud, wanted: dict[str, Any]
) -> None:
    store(cloud, wanted, b"{}")

    assert_problem(service.get("/predict", params=wanted), 500, "no record of a run")
    assert not cloud.exists(wanted["output_table"])


def test_a_journal_that_can_not_be_written_begins_no_run(
    start_behind: Callable[..., Client],
    objects: ObjectsProxy,
    cloud: Cloud,
    wanted: dict[str, Any],
) -> None:
    service = start_behind(gcs_bucket_runs_dev="no-such-bucket", retry_seconds=0.1)

    assert_problem(service.get("/predict", params=wanted), 404, "no-such-bucket")
    assert not cloud.exists(wanted["output_table"])


# What is shown


def test_a_run_may_be_asked_for_by_its_id(service: Client, wanted: dict[str, Any]) -> None:
    result = service.get("/predict", params=wanted).json()

    run = run_of(service, wanted)

    assert run["state"] == "committed"
    assert run["result"] == result
    assert run["rows_done"] == 100
    assert run["request"]["input_table"] == wanted["input_table"]
    assert service.get(f"/runs/{wanted['run_id']}", params={"env": "dev"}).json() == run


def test_a_run_that_nobody_began_is_not_found(service: Client) -> None:
    assert_problem(service.get("/runs/nobody"), 404, "nobody")
    assert_problem(service.get("/runs/no.body"), 400, "run_id")
    assert_problem(service.get("/runs", params={"env": "nowhere"}), 400, "env")


def test_runs_are_listed_newest_first_page_by_page_and_by_state(
    start_service: Callable[..., Client], cloud: Cloud, table: str, doubles: str
) -> None:
    service, _ = with_own_journal(start_service, cloud)
    ids = [cloud.name("run") for _ in range(5)]
    raises = cloud.publish(models.RaisesAt(0))
    for number, run_id in enumerate(ids):
        model = raises if number == 2 else doubles
        service.predict(table, cloud.new_table(), model, run_id=run_id)

    def page(**more: Any) -> tuple[list[str], str | None]:
        answer = service.get("/runs", params={"env": "dev", "limit": 2} | more).json()
        return [run["run_id"] for run in answer["runs"]], answer["next_page"]

    first, token = page()
    second, token = page(page=token)
    third, end = page(page=token)

    assert [*first, *second, *third] == ids[::-1]
    assert end is None
    assert page(state="failed") == ([ids[2]], None)
    assert page(state="committed", limit=100)[0] == [ids[4], ids[3], ids[1], ids[0]]


def test_what_is_no_record_hides_no_run_from_the_list(
    start_service: Callable[..., Client], cloud: Cloud, table: str, doubles: str
) -> None:
    service, bucket = with_own_journal(start_service, cloud)
    ids = [cloud.name("run") for _ in range(5)]
    for run_id in ids:
        service.predict(table, cloud.new_table(), doubles, run_id=run_id)
    objects = cloud.clients.objects

    def put(name: str, data: bytes) -> None:
        cloud.portal.call(
            lambda: objects.upload(bucket, f"runs/{name}", data, content_type="application/json")
        )

    # Copied by hand, so without the labels that tell when it was; and what nobody's run is.
    put(f"{ids[0]}.json", cloud.portal.call(objects.download, bucket, f"runs/{ids[0]}.json"))
    put("note.json", b"{}")
    listed, page = [], None
    while True:
        wanted = {"env": "dev", "limit": 2} | ({"page": page} if page else {})
        response = service.get("/runs", params=wanted)
        assert response.status_code == 200, response.text
        listed += [run["run_id"] for run in response.json()["runs"]]
        if (page := response.json()["next_page"]) is None:
            break

    assert listed == [*ids[:0:-1], ids[0]]


def test_a_record_that_never_arrives_whole_is_given_up(
    start_behind: Callable[..., Client], objects: ObjectsProxy, wanted: dict[str, Any]
) -> None:
    service = start_behind()
    assert service.get("/predict", params=wanted).status_code == 200
    objects.damage = lambda body: body[:-1]

    response = service.get(f"/runs/{wanted['run_id']}")

    assert_problem(response, 503, "can't be read. Try again")


def test_a_commit_that_is_refused_is_told_to_who_asks_for_the_run(
    start_behind: Callable[..., Client], rows: RowsProxy, wanted: dict[str, Any]
) -> None:
    def refuse() -> None:
        raise RefusedCall(grpc.StatusCode.PERMISSION_DENIED, "no")

    service = start_behind()
    rows.before["BatchCommitWriteStreams"] = refuse
    response = service.get("/predict", params=wanted)
    left = run_of(service, wanted)
    del rows.before["BatchCommitWriteStreams"]

    assert_problem(response, 403, "The commit is not open to these credentials")
    assert (left["state"], left["abandoned"]) == ("prepared", True)
    assert left["error"]["detail"] == response.json()["detail"]
    assert service.get("/predict", params=wanted).json()["rows"] == 100
    assert run_of(service, wanted)["error"] is None


def test_who_does_not_want_to_wait_is_told_where_to_look(
    service: Client, cloud: Cloud, table: str, gate: str
) -> None:
    wanted = request_for(table, cloud.new_table(), gate, run_id=cloud.name("run"))

    with log_lines() as log:
        response = service.get("/predict", params=wanted, headers=ASYNC)
        while_under_way = service.get(response.headers["Location"]).json()
        models.event(f"{gate} open").set()
        log.wait_for("run succeeded", run_id=wanted["run_id"])
    after = service.get(response.headers["Location"]).json()

    assert response.status_code == 202
    assert response.headers["Location"] == f"/runs/{wanted['run_id']}?env=dev"
    assert while_under_way["state"] == "running"
    assert (after["state"], after["result"]["rows"]) == ("committed", 100)
    assert service.get("/predict", params=wanted, headers=ASYNC).status_code == 200


def test_what_can_not_begin_is_refused_at_once(
    service: Client, cloud: Cloud, table: str, doubles: str
) -> None:
    wanted = request_for(table, cloud.new_table(), doubles, id_columns=["nope"])

    assert_problem(service.get("/predict", params=wanted, headers=ASYNC), 422, "nope")
