"""What the service and the command line share: the registry's second look at golden rows."""

from __future__ import annotations

import pickle
from typing import Any

import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

from mlsys.frame import to_arrow
from mlsys.publish import publish_model
from mlsys.settings import Settings
from tests.conftest import Client, Cloud

FRAME = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0]})


def published(cloud: Cloud, settings: Settings) -> str:
    name = cloud.name("golden").replace("_", "-")
    publish_model(
        LinearRegression().fit(FRAME, FRAME["x"] * 2), name, rows=FRAME, settings=settings
    )
    return name


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
    other = LinearRegression().fit(FRAME, FRAME["x"] * 3)
    cloud.upload(f"{name}/v1/model.pkl", pickle.dumps(other))

    row = registered(service, cloud, name)
    table = cloud.put(to_arrow(FRAME))
    answer = service.predict(table, cloud.new_table(), name)

    assert row["verified"] is False
    assert "4 of 4 predictions differ" in row["verification"]
    assert answer.status_code == 500
    assert "4 of 4 predictions differ" in answer.json()["detail"]


def test_a_verdict_stays_until_the_object_changes(
    service: Client, cloud: Cloud, settings: Settings
) -> None:
    name = published(cloud, settings)
    first = registered(service, cloud, name)
    again = registered(service, cloud, name)
    other = LinearRegression().fit(FRAME, FRAME["x"] * 5)
    cloud.upload(f"{name}/v1/model.pkl", pickle.dumps(other))
    changed = registered(service, cloud, name)

    assert first["verified"] is True
    assert again["verified"] is True
    assert changed["verified"] is False


def test_a_model_without_golden_rows_is_not_asked(service: Client, cloud: Cloud) -> None:
    name = cloud.publish(LinearRegression().fit(FRAME, FRAME["x"]), target="y")

    row = registered(service, cloud, name)

    assert (row["verified"], row["verification"]) == (None, None)


@pytest.mark.parametrize("env", ["staging", "prod"])
def test_a_deployment_registers_its_own_environment_only(start_service: Any, env: str) -> None:
    response = start_service(mlsys_env="dev").get("/model-registry", params={"env": env})

    assert response.status_code == 403
    assert f"Call the service of {env}" in response.json()["detail"]
