"""Memory stays flat: a table several times as large takes no more of it."""

from __future__ import annotations

from typing import Any

import httpx2
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.service.support import process_environment, request_for, service_process

SMALL, LARGE = 500_000, 2_500_000
MIB = 2**20
# The rows that the one has more than the other take 168 MiB.
MARGIN = 84 * MIB
# Chunks whose size is found out stay smaller where a busy machine is slow, and so does the peak.
CHUNK_ROWS = 65_536
FLOATS, INTEGERS = [f"f{number}" for number in range(7)], [f"i{number}" for number in range(3)]


def table_of(cloud: Cloud, rows: int) -> str:
    """A table of an id, 7 FLOAT64 and 3 INT64 columns, made where it is stored."""
    table = cloud.new_table("rows")
    floats = [f"MOD(id * {n + 3}, 1009) / 7.0 AS {name}" for n, name in enumerate(FLOATS)]
    integers = [f"MOD(id * {n + 11}, 997) AS {name}" for n, name in enumerate(INTEGERS)]
    cloud.query(
        f"CREATE TABLE `{table}` AS SELECT id, {', '.join(floats + integers)} "
        f"FROM UNNEST(GENERATE_ARRAY(0, {rows - 1})) AS id"
    )
    return table


@pytest.fixture(scope="module")
def model(cloud: Cloud) -> str:
    values = np.random.default_rng(0).normal(size=(1000, 10))
    frame = pd.DataFrame(values, columns=FLOATS + INTEGERS)
    return cloud.publish(LinearRegression().fit(frame, values.sum(axis=1)))


def predicted(servers: LocalServers, cloud: Cloud, model: str, rows: int) -> dict[str, Any]:
    """The result of a run over so many rows, by a service that has done nothing before."""
    output = cloud.new_table("scored")
    wanted = request_for(table_of(cloud, rows), output, model)
    env = process_environment(**servers.env, CHUNK_ROWS=str(CHUNK_ROWS))
    with service_process(env) as process:
        response = httpx2.get(f"{process.url}/predict", params=wanted, timeout=300)
    assert response.status_code == 200, response.text
    [told] = cloud.query(
        "SELECT COUNT(*) AS n, COUNT(DISTINCT id) AS ids, SUM(id) AS sum, "
        f"COUNT(Prediction) AS predictions FROM `{output}`"
    )
    assert dict(told) == {
        "n": rows,
        "ids": rows,
        "sum": rows * (rows - 1) // 2,
        "predictions": rows,
    }
    return response.json()


def test_five_times_the_rows_take_no_more_memory(
    servers: LocalServers, cloud: Cloud, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = predicted(servers, cloud, model, SMALL)
    large = predicted(servers, cloud, model, LARGE)

    with capsys.disabled():
        for result in (small, large):
            peak, rate = result["peak_memory_bytes"] / MIB, result["rows_per_second"]
            print(f"\n{result['rows']:,} rows: {peak:,.0f} MiB at most, {rate:,.0f} rows/s", end="")
    assert large["rows"] == LARGE
    assert large["peak_memory_bytes"] - small["peak_memory_bytes"] < MARGIN
