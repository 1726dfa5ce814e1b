"""A model that holds the interpreter is predicted by processes, all or nothing all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime

import anyio
import psutil
import pyarrow as pa
import pytest

from mlsys.clients import open_clients
from mlsys.errors import Unavailable
from mlsys.local import LocalServers
from service.contract import PredictRequest
from service.model import ModelCache
from service.pipeline import prepare
from service.workers import Assignment, in_processes
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    PATIENCE,
    abandoned,
    assert_nothing_appended,
    assert_problem,
    log_lines,
    numbers,
    process_environment,
    request_for,
    service_process,
)

MANY = 200_000  # Enough for the local server to give several streams.
# A second of it is not worth a process, this is.
MICROS = 60


@pytest.fixture(scope="module")
def table(cloud: Cloud) -> str:
    return cloud.put(numbers(MANY))


@pytest.fixture
def start(start_service: Callable[..., Client]) -> Callable[..., Client]:
    return lambda **changes: start_service(
        **{"read_streams": 2, "predict_threads": 2, "worker_processes": 2} | changes
    )


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_a_model_that_holds_the_interpreter_is_predicted_by_processes(
    start: Callable[..., Client], cloud: Cloud, table: str, streams: int
) -> None:
    output, model = cloud.new_table(), cloud.publish(models.PythonPerRow(MICROS))
    service = start(read_streams=streams)

    with log_lines() as lines:
        response = service.predict(table, output, model)

    assert response.json()["rows"] == MANY, response.text
    assert lines.wait_for("model tried")["processes"]
    assert lines.wait_for("run started")["streams"] == streams
    assert len({lines.wait_for("worker started")["pid"] for _ in range(2)}) == 2
    [told] = cloud.query(
        "SELECT COUNT(*) AS n, COUNT(DISTINCT id) AS ids, SUM(id) AS sum, "
        f"COUNTIF(Prediction != 2 * id) AS wrong FROM `{output}`"
    )
    assert dict(told) == {"n": MANY, "ids": MANY, "sum": sum(range(MANY)), "wrong": 0}


def test_a_run_too_short_for_the_first_processes_has_them_once_they_start_sooner(
    servers: LocalServers, cloud: Cloud, table: str
) -> None:
    model, short = cloud.publish(models.PythonPerRow(MICROS)), cloud.put(numbers(MANY * 3 // 10))
    env = process_environment(**servers.env, READ_STREAMS="2", WORKER_PROCESSES="2")
    told = []

    with (
        service_process(env | {"PREDICT_THREADS": "2"}) as service,
        Client(base_url=service.url, timeout=PATIENCE) as client,
    ):
        for name in (short, table, short):
            output = cloud.new_table()
            response = client.predict(name, output, model)
            assert response.json()["rows"] == cloud.count(output) == cloud.count(name)
            told.append(json.loads(service.wait_for_line("run started"))["processes"])

    assert told == [0, 2, 2]


def test_a_model_that_raises_in_a_process_is_told_with_its_row(
    start: Callable[..., Client], cloud: Cloud, table: str
) -> None:
    output, model = cloud.new_table(), cloud.publish(models.PythonPerRow(MICROS, raises_at=150_000))

    service = start()

    with log_lines() as lines:
        response = service.predict(table, output, model)

    assert lines.wait_for("model tried")["processes"]
    told = assert_problem(response, 500, "ArithmeticError", "Nothing was written")
    assert told["exception"] == "ArithmeticError"
    assert isinstance(told["row"], int)
    assert_nothing_appended(cloud, output)


def test_a_row_that_a_model_raises_on_as_it_is_tried_is_told_as_well(
    start: Callable[..., Client], cloud: Cloud, table: str
) -> None:
    output = cloud.new_table()
    model = cloud.publish(models.RaisesAt(5.0, exception=GeneratorExit))

    response = start(read_streams=2).predict(table, output, model)

    told = assert_problem(response, 500, "GeneratorExit", "at row", "Nothing was written")
    assert told["exception"] == "GeneratorExit"
    assert_nothing_appended(cloud, output)


def test_a_process_that_is_killed_ends_the_run_and_nothing_is_written(
    start: Callable[..., Client], cloud: Cloud, table: str
) -> None:
    output, model = cloud.new_table(), cloud.publish(models.PythonPerRow(MICROS, dies_at=150_000))

    response = start().predict(table, output, model)

    assert_problem(response, 503, "exit status -9", "Nothing was written")
    assert_nothing_appended(cloud, output)


def test_a_model_that_a_process_can_not_load_is_told_as_such(
    start: Callable[..., Client], cloud: Cloud, table: str
) -> None:
    output, model = cloud.new_table(), cloud.publish(models.StaysAtHome(MICROS))

    response = start().predict(table, output, model, chunk_rows=50_000)

    assert_problem(response, 500, "can't be unpickled", "ArithmeticError")
    assert_nothing_appended(cloud, output)


def test_after_a_call_that_was_cancelled_a_process_answers_no_other(
    cloud: Cloud, table: str
) -> None:
    model = cloud.publish(models.PythonPerRow(MICROS))
    request = PredictRequest(**request_for(table, cloud.new_table(), model))
    settings = cloud.settings

    def rows(count: int) -> pa.Table:
        return pa.table({"id": pa.array(range(count)), "x": pa.array(range(count), pa.float64())})

    async def main() -> None:
        async with open_clients(settings) as clients, anyio.create_task_group() as tasks:
            job = await prepare(
                request,
                run_id="cancelled",
                now=datetime.now(UTC),
                pins=None,
                clients=clients,
                cache=ModelCache(settings.model_cache_bytes, tasks),
                settings=settings,
            )
            found = job.model
            told = Assignment(
                job.plan, job.predictor, job.schema, found.blob, found.metadata, settings
            )
            async with in_processes(told, 1) as predict:
                [answer] = (await predict(rows(3))).batches
                assert answer["Prediction"].to_pylist() == [0.0, 2.0, 4.0]
                with anyio.move_on_after(0.1) as gone:
                    await predict(rows(100_000))  # For seconds.
                assert gone.cancelled_caught
                with pytest.raises(Unavailable):
                    await predict(rows(2))

    anyio.run(main)


def test_a_caller_who_goes_away_ends_the_processes(
    start: Callable[..., Client], cloud: Cloud, table: str
) -> None:
    output, model = cloud.new_table(), cloud.publish(models.PythonPerRow(MICROS))
    service = start()

    with log_lines() as lines:
        with abandoned(service, request_for(table, output, model)):
            workers = [lines.wait_for("worker started")["pid"] for _ in range(2)]
        lines.wait_for("GET /predict 499")

    assert_ended(workers)
    assert_nothing_appended(cloud, output)


def test_processes_end_with_a_service_that_is_killed(
    servers: LocalServers, cloud: Cloud, table: str
) -> None:
    output, model = cloud.new_table(), cloud.publish(models.PythonPerRow(MICROS))
    env = process_environment(**servers.env, READ_STREAMS="2", WORKER_PROCESSES="2")
    with service_process(env | {"PREDICT_THREADS": "2"}) as service:
        with abandoned(Client(base_url=service.url), request_for(table, output, model)):
            told = [json.loads(service.wait_for_line("worker started")) for _ in range(2)]
            service.process.kill()

        assert_ended([each["pid"] for each in told])
    assert_nothing_appended(cloud, output)


def assert_ended(workers: list[int]) -> None:
    running = [psutil.Process(each) for each in workers if psutil.pid_exists(each)]
    _, alive = psutil.wait_procs(running, timeout=PATIENCE)
    assert not alive
