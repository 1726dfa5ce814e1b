"""Whatever is wrong is told with a problem that names the mend, and nothing is appended."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pyarrow as pa
import pytest
from sklearn.linear_model import LinearRegression

from mlsys.errors import AccessDenied
from mlsys.local import PROJECT, free_ports
from mlsys.settings import Settings
from service.engine import Engine
from service.memory import Memory
from service.model import ModelCache
from service.runs import Runs
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    PATIENCE,
    assert_nothing_appended,
    assert_problem,
    numbers,
    process_environment,
    request_for,
    service_process,
)

LONG = "x" * 2000
HOSTILE = [
    "`; DROP TABLE x; --",
    "a`b",
    "it's",
    'say "x"',
    "..",
    "../../secret",
    "a/../b",
    "%2e%2e%2f",
    "a\x00b",
    "a\nb",
    "a\r\nX-Injected: 1",
    "modèle",
    "表",
    "\u202egnp",
    " ",
    "",
    LONG,
]
MALFORMED = {
    "env": [*HOSTILE, "foo", "DEV", "dev ", "dev/../prod"],
    "model_name": [*HOSTILE, "Titanic", "a_b", "-a", "a-", "a--b", "a/v1/model", "a" * 64, "a.b"],
    "model_version": [*HOSTILE, "1", "v0", "v01", "V1", "v1.0", "newest", "v1/../v2", "v٣", "v-1"],
    "run_id": [*HOSTILE, "a b", "a.b", "a" * 65, "a/b"],
    "chunk_rows": [*HOSTILE, "0", "-1", "abc", str(10**9), "1.5", "1e3", "nan", str(10**30)],
    "id_columns": ["`; DROP TABLE x; --", "a`b", 'say "x"', "..", "a\x00b", "a\nb", "", LONG],
    "where": ["", "x" * 10_001],
}
TABLES = [
    *HOSTILE,
    "table",
    "dataset.table",
    "my-project.data",
    "my-project.data.table.more",
    "my-project..table",
    "my-project.data.",
    ".data.table",
    "MY-PROJECT.data.table",
    "p.data.table",
    "my-project.da-ta.table",
    "my-project.data.ta`ble",
    "my-project.data.ta ble",
    "my-project.data.tablé",
    "my-project.data.table\n",
    "my-project.data.table$20240101",
    "my-project.data.table@1",
    "my-project.data.ta/../ble",
    "my-project.data." + LONG,
]
MALFORMED |= {"input_table": TABLES, "output_table": TABLES}


@dataclass(frozen=True)
class Given:
    """A prediction that works, but for what a test changes."""

    service: Client
    cloud: Cloud
    table: str
    model: str

    def refused(self, status: int, *told: str, **changes: Any) -> dict[str, Any]:
        """Asks with `changes` (None takes a parameter out) and checks the refusal."""
        output = self.cloud.new_table()
        wanted = request_for(self.table, output, self.model) | changes
        parameters = {name: value for name, value in wanted.items() if value is not None}
        response = self.service.get("/predict", params=parameters)
        problem = assert_problem(response, status, *told)
        assert_nothing_appended(self.cloud, output)
        return problem

    def unusable(self, *told: str, table: str | None = None, **files: bytes) -> dict[str, Any]:
        """Uploads a model's files, asks for a prediction by it and checks that it fails."""
        name = self.cloud.name("model").replace("_", "-")
        for file, data in files.items():
            self.cloud.upload(f"{name}/v1/{file}.{'json' if file == 'metadata' else 'pkl'}", data)
        return self.refused(
            500,
            f"gs://mlsys-models-dev/{name}/v1/",
            *told,
            model_name=name,
            input_table=table or self.table,
        )


@pytest.fixture(scope="module")
def given(service: Client, cloud: Cloud) -> Given:
    table = cloud.put(numbers(10, word=[f"hush{number}" for number in range(10)]))
    return Given(service, cloud, table, cloud.publish(models.Doubles()))


def test_what_the_others_change_works(given: Given) -> None:
    output = given.cloud.new_table()

    assert given.service.predict(given.table, output, given.model).status_code == 200
    assert given.cloud.count(output) == 10


@pytest.mark.parametrize(
    ("parameter", "value"),
    [(parameter, value) for parameter, values in MALFORMED.items() for value in values],
    ids=lambda value: ascii(value[:30]),
)
def test_a_malformed_value_is_refused_by_the_name_of_its_parameter(
    given: Given, parameter: str, value: str
) -> None:
    problem = given.refused(400, parameter, **{parameter: value})

    assert problem["type"] == "urn:mlsys:invalid-request"


@pytest.mark.parametrize(
    ("parameter", "mend"),
    {
        "env": "'dev', 'staging' or 'prod'",
        "input_table": "Write it as project.dataset.table",
        "output_table": "Write it as project.dataset.table",
        "model_name": "such as titanic-survival",
        "model_version": "Use v1, v2, … or latest",
        "run_id": "^[A-Za-z0-9_-]{1,64}$",
        "chunk_rows": "integer",
    }.items(),
)
def test_a_refusal_tells_what_is_admitted(given: Given, parameter: str, mend: str) -> None:
    given.refused(400, f"{parameter}: ", mend, **{parameter: "../x"})


def test_every_malformed_parameter_is_told_at_once(given: Given) -> None:
    given.refused(
        400, "env: ", "model_name: ", "chunk_rows: ", env="x", model_name="X", chunk_rows="0"
    )


def test_bytes_that_are_no_text_are_refused(given: Given) -> None:
    response = given.service.get("/predict?env=dev&model_name=%ff%fe&model_version=v1")

    assert_problem(response, 400, "model_name: ")


def test_an_unknown_parameter_is_refused(given: Given) -> None:
    given.refused(400, "chunkrows: there is no such parameter", chunkrows="5")


@pytest.mark.parametrize(
    "parameter", ["env", "input_table", "output_table", "model_name", "model_version"]
)
def test_a_missing_parameter_is_named(given: Given, parameter: str) -> None:
    given.refused(400, f"{parameter}: is required", **{parameter: None})


def test_a_missing_input_table_is_named(given: Given) -> None:
    table = given.cloud.new_table("nowhere")

    given.refused(404, table, "Check its full path", input_table=table)


def test_a_missing_output_dataset_is_named(given: Given) -> None:
    given.refused(404, f"{PROJECT}.nowhere", "Create it", output_table=f"{PROJECT}.nowhere.scored")


def test_a_missing_model_is_named_with_the_place_to_upload_it_to(given: Given) -> None:
    given.refused(404, "no model named nobody", "nobody/v1/model.pkl", model_name="nobody")


def test_of_a_missing_version_those_that_exist_are_told(given: Given) -> None:
    given.refused(404, f"{given.model}/v7/model.pkl", "Versions there: v1", model_version="v7")


def test_a_view_is_refused_with_the_way_to_materialize_it(given: Given) -> None:
    view = given.cloud.new_table("view")
    given.cloud.query(f"CREATE VIEW `{view}` AS SELECT * FROM `{given.table}`")

    given.refused(400, f"{view} is a view", "CREATE TABLE … AS SELECT", input_table=view)
    given.refused(400, f"{view} is a view", output_table=view)


def test_one_table_can_not_be_both_input_and_output(given: Given) -> None:
    given.refused(400, "are the same", output_table=given.table)

    assert given.cloud.count(given.table) == 10


def test_all_missing_columns_are_listed(given: Given) -> None:
    model = LinearRegression()
    frame = pa.table({"x": [1.0, 2.0], "y": [1.0, 3.0], "words": [0.0, 1.0]}).to_pandas()
    name = given.cloud.publish(model.fit(frame, frame["x"]))

    problem = given.refused(
        422,
        "lacks columns",
        "y",
        "words (did you mean word?)",
        "nope",
        model_name=name,
        id_columns=["id", "nope"],
    )

    assert problem["missing_columns"] == ["y", "words", "nope"]


@pytest.mark.parametrize("name", ["it's", "modèle", "表", "a b", "a-b"])
def test_an_id_column_that_is_not_there_is_a_missing_column(given: Given, name: str) -> None:
    assert given.refused(422, name, id_columns=name)["missing_columns"] == [name]


def test_all_mistyped_columns_are_listed(given: Given) -> None:
    name = given.cloud.publish(
        models.Doubles(),
        features=[{"name": "x", "type": "STRING"}],
    )
    table = given.cloud.new_table()
    given.cloud.query(f"CREATE TABLE `{table}` AS SELECT 1 AS id, STRUCT(1 AS a) AS x")

    told = given.refused(422, "x is FLOAT64, not STRING", "Cast", model_name=name)
    nested = given.refused(422, "x is STRUCT", input_table=table)

    assert told["mistyped_columns"] == ["x is FLOAT64, not STRING"]
    assert nested["mistyped_columns"] == ["x is STRUCT"]


def test_an_output_table_that_can_not_take_the_columns_is_refused_before_a_row_is_read(
    given: Given,
) -> None:
    output = given.cloud.put(pa.table({"id": ["a"], "Prediction": [1]}))
    counted = given.cloud.name()
    name = given.cloud.publish(models.Counted(counted))

    problem = given.refused(
        422, output, "Alter that table", model_name=name, output_table=output, id_columns=["id"]
    )

    assert problem["output_columns"] == [
        "id is STRING, not INT64",
        "Prediction is INT64, not FLOAT64",
        "PredictionTimestamp TIMESTAMP is missing",
        "ModelName STRING is missing",
        "ModelVersion STRING is missing",
    ]
    assert given.cloud.count(output) == 1
    assert not models.calls[f"{counted} rows"]


def test_an_id_column_may_not_have_the_name_of_a_prediction(given: Given) -> None:
    table = given.cloud.put(numbers(3, prediction=[1, 2, 3]))

    given.refused(422, "prediction", "id_columns without them", input_table=table)
    given.refused(400, "id more than once", id_columns=["id", "id"])


@pytest.mark.parametrize("damaged", [b"", b"\x80", b"not a pickle", pickle.dumps([1] * 99)[:-9]])
def test_a_damaged_pickle_is_named(given: Given, damaged: bytes) -> None:
    given.unusable("can't be unpickled", "Save it again", model=damaged)


def test_a_pickle_of_something_else_than_a_model_is_told_by_its_type(given: Given) -> None:
    name = given.cloud.publish({"a": 1}, features=["x"])

    given.refused(500, "is a dict", "no `predict`", "Upload a fitted", model_name=name)


@pytest.mark.parametrize(
    ("pickled", "mend"),
    [
        (b"cno_such_package\nModel\n.", "needs the package no_such_package"),
        (b"csklearn.no_such_module\nModel\n.", "needs the package sklearn.no_such_module"),
        (b"ctests.service.models\nGone\n.", "classes of your own belong in a package"),
        (b"c__main__\nMyModel\n.", "classes of your own belong in a package"),
    ],
)
def test_a_pickle_that_needs_what_is_not_here_says_what(
    given: Given, pickled: bytes, mend: str
) -> None:
    given.unusable(mend, model=pickled)


@pytest.mark.parametrize("kind", ["ValueError", "RecursionError", "MemoryError", "SystemExit"])
def test_a_pickle_that_raises_is_a_problem_of_that_model_alone(given: Given, kind: str) -> None:
    failing = models.fails_to_load(kind, f"see {models.__file__}")

    given.unusable(kind, "can't be unpickled", model=pickle.dumps(failing))

    assert given.service.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("metadata", "mend"),
    [
        (b"{", "Invalid JSON"),
        (b"", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[]", "object"),
        (b'{"features": "x"}', "features"),
        (b'{"features": [{"type": "INT64"}]}', "features.0"),
        (b'{"target": 5}', "target"),
        (b'{"frame": "spark"}', "frame"),
    ],
)
def test_broken_metadata_is_named(given: Given, metadata: bytes, mend: str) -> None:
    given.unusable(
        "metadata.json",
        mend,
        "upload it again",
        model=pickle.dumps(models.Doubles()),
        metadata=metadata,
    )


def test_a_model_of_bare_arrays_needs_its_features_in_the_metadata(given: Given) -> None:
    model = pickle.dumps(LinearRegression().fit([[1.0], [2.0]], [1.0, 2.0]))

    given.unusable("List them in metadata.json", '{"features": ["Age", …]}', model=model)
    given.unusable(
        "fitted on 1 features", "lists 2", model=model, metadata=b'{"features": ["x", "id"]}'
    )


def test_a_model_that_raises_far_into_a_table_is_told_with_its_row(
    cloud: Cloud, start_service: Callable[..., Client]
) -> None:
    table, output = cloud.new_table("million"), cloud.new_table()
    cloud.query(
        f"CREATE TABLE `{table}` AS SELECT id, CAST(id AS FLOAT64) AS x "
        "FROM UNNEST(GENERATE_ARRAY(0, 999999)) AS id ORDER BY id"
    )
    service = start_service(read_streams=1)

    response = service.predict(table, output, cloud.publish(models.RaisesAt(700_000.0)))

    problem = assert_problem(response, 500, "ValueError", "at row 700,000", "Exclude such rows")
    assert (problem["exception"], problem["row"]) == ("ValueError", 700_000)
    assert "700000.0" not in problem["detail"]
    assert cloud.count(output) == 0


@pytest.mark.parametrize("kind", [ValueError, RecursionError, MemoryError, SystemExit])
def test_whatever_a_model_raises_is_a_problem_of_that_run_alone(
    given: Given, kind: type[BaseException]
) -> None:
    name = given.cloud.publish(models.RaisesAt(5.0, exception=kind))

    problem = given.refused(500, kind.__name__, "at row 5", model_name=name)

    assert problem["exception"] == kind.__name__
    assert given.service.get("/health").status_code == 200


def test_a_deployment_answers_for_its_own_environment_only(
    cloud: Cloud, given: Given, start_service: Callable[..., Client]
) -> None:
    own = Given(start_service(mlsys_env="dev"), cloud, given.table, given.model)

    assert own.refused(403, "env=dev only", env="prod")["type"] == "urn:mlsys:access-denied"
    assert own.service.predict(own.table, cloud.new_table(), own.model).status_code == 200


def test_a_model_is_looked_for_in_the_bucket_of_its_environment_only(given: Given) -> None:
    name = given.cloud.publish(models.Doubles(), env="staging")

    given.refused(404, "gs://mlsys-models-dev", model_name=name)
    response = given.service.predict(given.table, given.cloud.new_table(), name, env="staging")

    assert response.status_code == 200
    assert response.json()["model"]["uri"] == f"gs://mlsys-models-staging/{name}/v1/model.pkl"


@pytest.mark.parametrize(
    "where",
    [
        "nope = 1",
        "CAST(word AS INT64) = 1",
        "1 = 1; DROP TABLE x",
        "x IN (SELECT 1)",
        "x = 1 AND",
        "(x = 1",
        "x >",
        "WHERE x = 1",
    ],
)
def test_a_filter_that_is_refused_is_told(given: Given, where: str) -> None:
    given.refused(400, given.table, where=where)


@pytest.mark.parametrize(
    ("body", "mend"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"", "is required"),
        (b"[]", "JSON object"),
        (b"1", "JSON object"),
        (b"null", "JSON object"),
        (b'"dev"', "JSON object"),
        (b'{"env": 1}', "env: "),
        (b'{"env": ["dev"]}', "env: "),
        (b'{"env": null}', "env: "),
        (b'{"run_id": 5}', "run_id: "),
        (b'{"id_columns": "id"}', "id_columns: "),
        (b'{"id_columns": [1]}', "id_columns.0: "),
        (b'{"where": {}}', "where: "),
        (b'{"chunk_rows": "many"}', "chunk_rows: "),
        (b'{"chunk_rows": 1.5}', "chunk_rows: "),
        (b'{"chunk_rows": true}', "chunk_rows: "),
        (b'{"no_such": 1}', "no_such: there is no such parameter"),
        (b'{"where": "x > 1 -- \\ud800"}', "where: holds half of a surrogate pair"),
        (b'{"id_columns": ["\\ud800"]}', "can't be the name of a column"),
        (b'{"run_id": "\\ud800"}', "run_id: "),
        (b'{"env": "\xff"}', "a JSON object in UTF-8"),
        (b'{"chunk_rows": ' + b"9" * 5000 + b"}", "a JSON object in UTF-8"),
    ],
)
def test_a_body_that_is_not_a_request_is_refused(given: Given, body: bytes, mend: str) -> None:
    response = given.service.post(
        "/predict", content=body, headers={"Content-Type": "application/json"}
    )

    assert_problem(response, 400, mend)


def test_a_body_of_another_type_is_refused_with_the_right_one(given: Given) -> None:
    wanted = request_for(given.table, given.cloud.new_table(), given.model)

    assert_problem(given.service.post("/predict", data=wanted), 400, "application/json")
    assert_problem(
        given.service.post("/predict", content=json.dumps(wanted)), 400, "application/json"
    )


def test_parameters_of_a_post_do_not_come_from_its_query(given: Given) -> None:
    wanted = request_for(given.table, given.cloud.new_table(), given.model)

    assert_problem(given.service.post("/predict", params=wanted), 400, "env: belongs into the body")


def test_a_run_id_in_the_query_of_a_post_is_refused_and_not_passed_over(given: Given) -> None:
    wanted = request_for(given.table, given.cloud.new_table(), given.model)

    response = given.service.post("/predict", params={"run_id": "nightly-1"}, json=wanted)

    assert_problem(response, 400, "run_id: belongs into the body")
    assert_nothing_appended(given.cloud, wanted["output_table"])


def test_an_unknown_path_is_a_problem(service: Client) -> None:
    assert_problem(service.get("/nowhere"), 404, "See /docs")
    assert_problem(service.get("/predict/../../secret"), 404)


@pytest.mark.parametrize(
    ("path", "allowed"), [("/predict", {"GET", "POST"}), ("/health", {"GET"}), ("/", {"GET"})]
)
def test_a_wrong_method_is_told_which_are_right(
    service: Client, path: str, allowed: set[str]
) -> None:
    response = service.delete(path)

    assert_problem(response, 405, "DELETE")
    assert set(response.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "setting",
    ["bigquery_storage_emulator_host", "storage_emulator_host", "bigquery_emulator_host"],
)
def test_a_cloud_that_can_not_be_reached_is_not_available(
    given: Given, start_service: Callable[..., Client], setting: str
) -> None:
    [port] = free_ports(1)
    scheme = "" if setting == "bigquery_storage_emulator_host" else "http://"
    lost = start_service(**{setting: f"{scheme}127.0.0.1:{port}"}, retry_seconds=0.5)
    output = given.cloud.new_table()

    response = lost.predict(given.table, output, given.model)

    problem = assert_problem(response, 503, "can't be reached", "try again")
    assert int(response.headers["Retry-After"]) >= 1
    assert problem["type"] == "urn:mlsys:unavailable"
    assert str(port) not in problem["detail"]
    assert_nothing_appended(given.cloud, output)
    assert lost.get("/health").status_code == 200


NO_CLOUD = {
    "bigquery_emulator_host": None,
    "bigquery_storage_emulator_host": None,
    "storage_emulator_host": None,
}


def test_without_credentials_the_service_is_up_and_says_how_to_get_some(tmp_path: Path) -> None:
    wanted = request_for("my-project.data.in", "my-project.data.out", "titanic-survival")
    with socket.create_server(("127.0.0.1", 0)) as metadata_server:
        place = f"127.0.0.1:{metadata_server.getsockname()[1]}"
        env = process_environment(
            HOME=str(tmp_path),
            GCE_METADATA_HOST=place,
            GCE_METADATA_IP=place,
            GCE_METADATA_DETECT_RETRIES="1",
        )
        with service_process(env) as service:
            # The metadata server is asked, and says nothing yet.
            metadata_server.settimeout(PATIENCE)
            question, _ = metadata_server.accept()

            assert httpx2.get(f"{service.url}/health").status_code == 200

            metadata_server.close()
            question.close()
            response = httpx2.get(f"{service.url}/predict", params=wanted, timeout=PATIENCE)

    assert_problem(response, 403, "no usable credentials", "gcloud auth application-default login")


def test_those_who_wait_for_credentials_are_told_by_one_look(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "credentials.json"
    os.mkfifo(file)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    causes: list[str] = []

    async def wait_for_clients(engine: Engine) -> None:
        with pytest.raises(AccessDenied, match="no usable credentials") as caught:
            await engine.clients()
        causes.append(str(caught.value.__cause__))

    async def main() -> None:
        with anyio.fail_after(PATIENCE):
            async with AsyncExitStack() as opened, anyio.create_task_group() as tasks:
                lost = settings.model_copy(update=NO_CLOUD)
                cache, memory = ModelCache(1, tasks), Memory.of(lost)
                engine = Engine(lost, Runs(tasks, 1), cache, memory, opened)
                for _ in range(3):
                    tasks.start_soon(wait_for_clients, engine)
                await anyio.wait_all_tasks_blocked()
                monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "another-look.json")
                # Waits for the first to look.
                await anyio.to_thread.run_sync(file.write_text, "no credentials")

    anyio.run(main)

    assert len(causes) == 3
    assert not [cause for cause in causes if "another-look" in cause]
