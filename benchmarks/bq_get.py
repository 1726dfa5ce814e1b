"""`bq_get` beside the google-cloud-bigquery client, on one table of the local server.

    uv run --with db-dtypes python -m benchmarks.bq_get [--rows 2000000] [--rounds 9]

or, where the environment is active already, `pip install db-dtypes` (which only the client's own
`to_dataframe` needs, and this project does not) and `.venv/bin/python -m benchmarks.bq_get`.

Both read the same table of 11 columns through the Storage Read API of the same local server, in one
process and by turns: A B, B A, A B, … after one round that does not count. Both open their clients
anew each time, as a notebook that calls them once does. The ratio is the median of the ratios of
the rounds, so that a machine that gets slower meanwhile slows both. What is measured is mostly
the local server, which the two share the cores with; how long this process itself was busy stands
beside it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import grpc
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from google.cloud.bigquery_storage_v1 import BigQueryReadClient
from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
    BigQueryReadGrpcTransport,
)

from mlsys import Settings, bq_get
from mlsys.clients import open_clients
from mlsys.local import DATASET, PROJECT, local_servers, make_places

COLUMNS = """
    id,
    MOD(id, 1009) / 7.0 AS float_1,
    MOD(id * 3, 1013) / 11.0 AS float_2,
    MOD(id * 5, 1019) / 13.0 AS float_3,
    MOD(id * 7, 1021) / 17.0 AS float_4,
    MOD(id * 11, 1031) / 19.0 AS float_5,
    IF(MOD(id, 10) = 0, NULL, MOD(id, 97)) AS integer_with_nulls,
    IF(MOD(id, 11) = 0, NULL, MOD(id, 3) = 0) AS boolean_with_nulls,
    CONCAT('word ', CAST(MOD(id, 1000) AS STRING)) AS string,
    TIMESTAMP_ADD(TIMESTAMP '2020-01-01', INTERVAL MOD(id, 1000000) SECOND) AS timestamp,
    DATE_ADD(DATE '2020-01-01', INTERVAL MOD(id, 1000) DAY) AS date
"""


@contextmanager
def tables_of(*sizes: int) -> Iterator[tuple[Settings, list[str]]]:
    """Local servers with tables of so many rows and 11 columns in them."""
    with local_servers() as servers:
        settings = servers.settings()
        yield settings, anyio.run(_fill, settings, sizes)


async def _fill(settings: Settings, sizes: Sequence[int]) -> list[str]:
    tables = [f"{PROJECT}.{DATASET}.rows_{rows}" for rows in sizes]
    async with open_clients(settings) as clients:
        await make_places(clients, settings)
        for table, rows in zip(tables, sizes, strict=True):
            source = f"UNNEST(GENERATE_ARRAY(1, {rows})) AS id"
            sql = f"CREATE TABLE `{table}` AS SELECT {COLUMNS} FROM {source}"
            await anyio.to_thread.run_sync(lambda sql=sql: clients.bigquery.query(sql).result())
    return tables


def describe_machine() -> None:
    """What the figures below were measured on."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("google-cloud-bigquery", "google-cloud-bigquery-storage", "pyarrow", "pandas")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}")
    print(f"Python {platform.python_version()}, {versions}")
    print(f"load before the start: {os.getloadavg()[0]:.1f}\n")


@contextmanager
def google_clients(settings: Settings) -> Iterator[tuple[bigquery.Client, BigQueryReadClient]]:
    """Google's own clients, led to the local servers."""
    channel = grpc.insecure_channel(
        settings.bigquery_storage_emulator_host, [("grpc.max_receive_message_length", -1)]
    )
    with (
        bigquery.Client(
            project=PROJECT,
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": settings.bigquery_emulator_host},
        ) as client,
        BigQueryReadClient(transport=BigQueryReadGrpcTransport(channel=channel)) as storage,
    ):
        yield client, storage


def contestants(
    settings: Settings, table: str
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What is compared: ours, and the client's."""

    def to_dataframe() -> Any:
        with google_clients(settings) as (client, storage):
            return client.list_rows(table).to_dataframe(bqstorage_client=storage)

    def to_arrow() -> Any:
        with google_clients(settings) as (client, storage):
            return client.list_rows(table).to_arrow(bqstorage_client=storage)

    return {
        "pandas": (lambda: bq_get(table, settings=settings), to_dataframe),
        "Arrow": (lambda: bq_get(table, "arrow", settings=settings), to_arrow),
    }


def timed(read: Callable[[], Any], rows: int) -> tuple[float, float]:
    """Seconds by the clock, and seconds that this process was busy."""
    gc.collect()
    clock, busy = time.perf_counter(), time.process_time()
    frame = read()
    took = time.perf_counter() - clock, time.process_time() - busy
    assert (len(frame), frame.shape[1]) == (rows, 11)
    return took


def compare(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], rows: int, rounds: int
) -> None:
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    both = {"ours": ours, "theirs": theirs}
    for round_ in range(rounds + 1):
        for who in sorted(both, reverse=bool(round_ % 2)):
            took = timed(both[who], rows)
            if round_:
                times[who].append(took)
    for who, label in (("ours", "bq_get"), ("theirs", "google-cloud-bigquery")):
        clock = [each[0] for each in times[who]]
        busy = statistics.median(each[1] for each in times[who])
        middle = statistics.median(clock)
        print(
            f"{name:8}{label:24}{middle:8.2f} s   {min(clock):5.2f} to {max(clock):5.2f}"
            f"{busy:9.2f} s busy{rows / middle:14,.0f} rows/s"
        )
    ratios = [
        mine[0] / other[0] for mine, other in zip(times["ours"], times["theirs"], strict=True)
    ]
    print(f"{name:8}ours / theirs, median of the rounds: {statistics.median(ratios):.2f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if importlib.util.find_spec("db_dtypes") is None:
        sys.exit(
            "The client's to_dataframe needs db-dtypes: "
            "uv run --with db-dtypes python -m benchmarks.bq_get"
        )
    describe_machine()
    with tables_of(options.rows) as (settings, [table]):
        print(f"{options.rows:,} rows of 11 columns, {options.rounds} rounds\n")
        for name, (ours, theirs) in contestants(settings, table).items():
            compare(name, ours, theirs, options.rows, options.rounds)


if __name__ == "__main__":
    main()
