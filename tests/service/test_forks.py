"""A model may start processes of its own."""

from __future__ import annotations

import psutil

from mlsys.local import LocalServers
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import PATIENCE, numbers, process_environment, service_process


def test_a_model_that_forks_is_answered_however_often_and_leaves_nothing_running(
    servers: LocalServers, cloud: Cloud
) -> None:
    table, model = cloud.put(numbers(60_000)), cloud.publish(models.Forks())
    env = process_environment(**servers.env)

    with service_process(env) as service, Client(base_url=service.url, timeout=PATIENCE) as client:
        try:
            for _ in range(8):
                output = cloud.new_table()
                response = client.predict(table, output, model, chunk_rows=30_000)
                assert response.status_code == 200, response.text
        finally:
            started = psutil.Process(service.process.pid).children(recursive=True)
            _, left = psutil.wait_procs(started, timeout=PATIENCE)
            for each in left:  # Or they would outlive the service.
                each.kill()

    assert not left
    assert cloud.rows(output, order_by="id")[59_999]["Prediction"] == 119_998
