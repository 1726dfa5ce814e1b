"""The memory of `bq_iter` over a table of ten million rows, beside Google's own iterator.

    uv run --with db-dtypes python -m benchmarks.bq_iter [--rows 10000000] [--rounds 3]

or `.venv/bin/python -m benchmarks.bq_iter`, which leaves Google's iterator out where db-dtypes is
not installed.

Each measurement is a fresh process that reads all of the table, 11 columns, from the local server
in chunks of 65,536 rows as pandas frames, adds up one column and looks at its own peak memory
(`ru_maxrss`, so with the interpreter and all libraries). By turns: a tenth of the table and the
whole of it by `bq_iter`, and the whole by `to_dataframe_iterable`. The figures are medians of the
rounds. The local server's messages are of 65,536 rows, several MB, where BigQuery's are of 1 MB: so
much more is under way.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from benchmarks import bq_get
from mlsys import Settings, bq_iter

LIMIT_MIB = 400
CHUNK_ROWS = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(read(*options.child)))
        return
    bq_get.describe_machine()
    with bq_get.tables_of(options.rows // 10, options.rows) as (settings, [tenth, whole]):
        compare(settings, tenth, whole, options.rounds)


def compare(settings: Settings, tenth: str, whole: str, rounds: int) -> None:
    cases = {"bq_iter, a tenth": ("ours", tenth), "bq_iter": ("ours", whole)}
    if importlib.util.find_spec("db_dtypes") is not None:
        cases["to_dataframe_iterable"] = ("theirs", whole)
    told: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, what in cases.items():
            told[case].append(in_fresh_process(settings, *what))
    for case, measured in told.items():
        rows = measured[0]["rows"]
        seconds = statistics.median(each["seconds"] for each in measured)
        peak = statistics.median(each["peak_mib"] for each in measured)
        print(
            f"{case:24}{rows:12,} rows{seconds:8.1f} s{rows / seconds:12,.0f} rows/s"
            f"{peak:8.0f} MiB at most"
        )
    worst = max(each["peak_mib"] for each in told["bq_iter"])
    print(f"\nthe most of any round of bq_iter: {worst:.0f} MiB, limit {LIMIT_MIB}")
    if worst > LIMIT_MIB:
        sys.exit(1)


def in_fresh_process(settings: Settings, who: str, table: str) -> dict[str, Any]:
    env = {
        "GCP_PROJECT_ID": settings.gcp_project_id,
        "BIGQUERY_EMULATOR_HOST": settings.bigquery_emulator_host,
        "BIGQUERY_STORAGE_EMULATOR_HOST": settings.bigquery_storage_emulator_host,
        "STORAGE_EMULATOR_HOST": settings.storage_emulator_host,
    }
    command = [sys.executable, "-m", "benchmarks.bq_iter", "--child", who, table]
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def read(who: str, table: str) -> dict[str, Any]:
    """Reads a table in a process that has done nothing before."""
    start = time.perf_counter()
    if who == "ours":
        rows, total = add_up(bq_iter(table, chunk_rows=CHUNK_ROWS))
    else:
        with bq_get.google_clients(Settings()) as (client, storage):
            frames = client.list_rows(table).to_dataframe_iterable(bqstorage_client=storage)
            rows, total = add_up(frames)
    seconds = time.perf_counter() - start
    assert total == rows * (rows + 1) // 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": rows, "seconds": seconds, "peak_mib": peak}


def add_up(frames: Iterable[Any]) -> tuple[int, int]:
    rows = total = 0
    for frame in frames:
        rows += len(frame)
        total += int(frame["id"].sum())
    return rows, total


if __name__ == "__main__":
    main()
