"""What the service and the command line share: the registry's second look at golden rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
from typing import Any

import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

from mlsys.frame import to_arrow
from mlsys.gcs import gcs_get
from mlsys.publish import publish_model
from mlsys.settings import Settings
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import PATIENCE, Background, assert_problem, numbers

BUCKET = "mlsys-models-dev"
FRAME = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0]})


def published(cloud: Cloud, settings: Settings) -> str:
    name = cloud.name("golden").replace("_", "-")
    publish_model(
        LinearRegression().fit(FRAME, FRAME["x"] * 2), name, rows=FRAME, settings=settings
    )
    return name


def retrained(cloud: Cloud, settings: Settings, name: str, factor: float) -> None:
    """Puts another model in the place of the published one; the golden rows stay as they are."""
    data = pickle.dumps(LinearRegression().fit(FRAME, FRAME["x"] * factor))
    metadata = json.loads(gcs_get(BUCKET, f"{name}/v1/metadata.json", settings=settings))
    metadata["sha256"] = hashlib.sha256(data).hexdigest()
    cloud.upload(f"{name}/v1/metadata.json", json.dumps(metadata).encode())
    cloud.upload(f"{name}/v1/model.pkl", data)


def registered(service: Client, cloud: Cloud, name: str) -> dict[str, Any]:
    response = service.get("/model-registry", params={"env": "dev"})
    assert response.status_code == 200, response.text
    table = response.json()["table"]
    [row] = cloud.query(f"SELECT * FROM `{table}` WHERE model_name = '{name}'")
    return dict(row)


def test_a_model_that_answers_as_it_did_is_registered_as_verified(
    service: Client, cloud: Cloud, settings: Settings
) -> None:
    row = registered(service, cloud, published(cloud, settings))

    assert (row["verified"], row["verification"]) == (True, None)


def test_a_model_that_answers_otherwise_is_registered_with_the_reason_and_refused(
    service: Client, cloud: Cloud, settings: Settings
) -> None:
    name = published(cloud, settings)
    retrained(cloud, settings, name, 3)

    row = registered(service, cloud, name)
    table = cloud.put(to_arrow(FRAME))
    answer = service.predict(table, cloud.new_table(), name)

    assert row["verified"] is False
    assert "4 of 4 predictions differ" in row["verification"]
    assert answer.status_code == 500
    assert "4 of 4 predictions differ" in answer.json()["detail"]


def test_a_model_that_its_metadata_was_not_written_for_is_not_unpickled(
    service: Client, cloud: Cloud, settings: Settings
) -> None:
    name = published(cloud, settings)
    cloud.upload(f"{name}/v1/model.pkl", b"cos\nsystem\n(S'exit 1'\ntR.")

    row = registered(service, cloud, name)
    answer = service.predict(cloud.put(to_arrow(FRAME)), cloud.new_table(), name)

    assert row["verified"] is False
    assert_problem(answer, 500, "checksums differ", "another version")


def test_a_verdict_stays_until_the_object_changes(
    service: Client, cloud: Cloud, settings: Settings
) -> None:
    name = published(cloud, settings)
    first = registered(service, cloud, name)
    again = registered(service, cloud, name)
    retrained(cloud, settings, name, 5)
    changed = registered(service, cloud, name)

    assert first["verified"] is True
    assert again["verified"] is True
    assert changed["verified"] is False


# As metadata.json has it of a model that doubles `x`.
GOLDEN = {
    "features": [{"name": "x", "type": "INT64"}],
    "golden": {"rows": [{"x": 1}], "predictions": [2]},
}


def test_a_model_that_panics_at_its_golden_rows_ends_nobody_elses_run(
    service: Client, cloud: Cloud
) -> None:
    gate = cloud.name("gate")
    table = cloud.put(numbers(10))
    gated, panics = (
        cloud.publish(models.Gated(gate)),
        cloud.publish(models.Raises(models.Panic()), **GOLDEN),
    )
    other = Background(lambda: service.predict(table, cloud.new_table(), gated))
    assert models.event(f"{gate} entered").wait(PATIENCE)

    refused = service.predict(table, cloud.new_table(), panics)

    models.event(f"{gate} open").set()
    assert_problem(refused, 500, "answers otherwise here", "it raises Panic")
    assert other.result().status_code == 200


def test_a_model_that_is_stored_encoded_is_told_and_keeps_no_other_from_being_registered(
    service: Client, cloud: Cloud
) -> None:
    good, encoded = cloud.publish(models.Doubles(), **GOLDEN), cloud.name("m").replace("_", "-")
    upload = cloud.clients.objects.upload
    cloud.portal.call(
        lambda: upload(
            BUCKET,
            f"{encoded}/v1/model.pkl",
            gzip.compress(pickle.dumps(models.Doubles())),
            content_type="application/octet-stream",
            metadata={"contentEncoding": "gzip"},
        )
    )
    cloud.upload(f"{encoded}/v1/metadata.json", json.dumps(GOLDEN).encode())

    refused = service.predict(cloud.put(numbers(10)), cloud.new_table(), encoded)

    assert_problem(refused, 500, "Content-Encoding gzip")
    assert registered(service, cloud, good)["verified"] is True
    row = registered(service, cloud, encoded)
    assert row["verified"] is False
    assert "Content-Encoding" in row["verification"]


def test_a_model_without_golden_rows_is_not_asked(service: Client, cloud: Cloud) -> None:
    name = cloud.publish(LinearRegression().fit(FRAME, FRAME["x"]), target="y")

    row = registered(service, cloud, name)

    assert (row["verified"], row["verification"]) == (None, None)


@pytest.mark.parametrize("env", ["staging", "prod"])
def test_a_deployment_registers_its_own_environment_only(start_service: Any, env: str) -> None:
    response = start_service(mlsys_env="dev").get("/model-registry", params={"env": env})

    assert response.status_code == 403
    assert f"Call the service of {env}" in response.json()["detail"]
