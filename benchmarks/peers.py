"""The same job by other means: a BigQuery table, a model, a BigQuery table; on the local servers.

    uv run python -m benchmarks.peers [--quick] [--ways service,whole]

`service` is this project's, asked over HTTP; `whole` takes the table into one pandas frame, asks
the model for labels and for probabilities and writes one load job; `whole_one_pass` knows that a
forest's labels follow from its probabilities, as the service and the others here do; `ray` is Ray
Data with its own BigQuery connector; `beam_by_chunk` and `beam_by_row` are Apache Beam's
RunInference on its direct runner, with a chunk of rows as its element, and with a row, as its guide
has it. The others run in an environment of their own, which this script makes out of the dependency
group `peers` where it is missing: see `benchmarks/contestants.py`.

Each measurement is of fresh processes. The service and the whole table take turns, and a figure is
the median of their rounds; the others, and 20 million rows, take long and run once. Seconds are
those of the job, from the first call to the last row committed: no imports, no start of a service
or of Ray and its workers, but for the few that Ray adds as it writes. Memory is the most that the
processes of a way hold together, shared pages counted once, the interpreter and all libraries with
it, the local server without. Ray and Beam are given fewer rows, and so is the service once more
beside them: what a job costs however few rows it has weighs more there. Its memory is that at more
rows.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import psutil

from benchmarks import models, tables
from benchmarks.harness import AS_IN_THE_IMAGE, MIB, Report
from benchmarks.models import Kind
from benchmarks.startup import started
from benchmarks.storage_server import ROOT
from mlsys.clients import open_clients
from mlsys.local import DATASET, PROJECT, LocalServers, ends_with_us, local_servers
from mlsys.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERVICE, WHOLE, WHOLE_ONCE = "service", "whole", "whole_one_pass"
RAY, BEAM, BEAM_ROWS = "ray", "beam_by_chunk", "beam_by_row"
WAYS = (SERVICE, WHOLE, WHOLE_ONCE, RAY, BEAM, BEAM_ROWS)
ENVIRONMENT = ROOT / ".venv-peers"

LEAST = {models.LINEAR.name: 1.5, models.FOREST.name: 2.2}
MOST_MEMORY, MOST_MEMORY_LARGE = 0.5, 0.1

_LOOK_SECONDS = 0.05
_RUN_SECONDS = 600
_BLOCK = 100_000
_TABLE = ", ".join(
    [
        "id",
        *(f"SIN(id * {n + 1}) * 2 AS f{n}" for n in range(len(tables.FLOATS))),
        *(f"MOD(id * {n + 7}, 1000) AS i{n}" for n in range(len(tables.INTEGERS))),
    ]
)
_TOLD = "PredictionTimestamp TIMESTAMP, ModelName STRING, ModelVersion STRING"
_ANSWERS = {
    models.LINEAR.name: "Prediction FLOAT64",
    models.FOREST.name: "Prediction INT64, PredictionProbability FLOAT64",
}


@dataclass(frozen=True)
class Measured:
    """One job of one way."""

    rows: int
    seconds: float
    peak_mib: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


class Held:
    """The most memory that a process and all it starts hold at once, in MiB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0.0

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            try:
                everyone = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(_held, everyone)) / MIB)


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _held(process: psutil.Process) -> int:
    # What processes share (Ray's blocks, mostly) counts once in all, by each one's part of it.
    try:
        told = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0 if psutil.LINUX else _resident(process)
    return int(told.partition("\nPss:")[2].split()[0]) * 1024 if "\nPss:" in told else 0


@dataclass
class Bench:
    """The local servers with a table of each size in them, the models, and the peers' Python."""

    servers: LocalServers
    settings: Settings
    place: Path
    python: Path | None
    tables: dict[int, str] = field(default_factory=dict)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return anyio.run(_query, self.settings, sql)

    def table(self, rows: int) -> str:
        """A table of so many rows, made where there is none yet."""
        if rows not in self.tables:
            path = f"{PROJECT}.{DATASET}.rows_{rows}"
            # Of a long array the server would make rows on one core, of several on all.
            numbers = (
                f"SELECT high * {_BLOCK} + low AS id "
                f"FROM UNNEST(GENERATE_ARRAY(0, {(rows - 1) // _BLOCK})) AS high, "
                f"UNNEST(GENERATE_ARRAY(0, {_BLOCK - 1})) AS low"
            )
            self.query(
                f"CREATE TABLE `{path}` AS SELECT {_TABLE} FROM ({numbers}) WHERE id < {rows}"
            )
            self.tables[rows] = path
        return self.tables[rows]

    def measure(self, way: str, kind: Kind, rows: int) -> Measured:
        """One job in fresh processes. Every row has to arrive, once.

        Raises:
            RuntimeError: it failed, or rows are missing.
        """
        source, output = self.table(rows), f"{PROJECT}.{DATASET}.{way}_{time.time_ns()}"
        # Nobody's load job could make it here; the service finds it and is spared the same.
        self.query(f"CREATE TABLE `{output}` (id INT64, {_ANSWERS[kind.name]}, {_TOLD})")
        run = self._service if way == SERVICE else self._peer
        seconds, peak = run(way, kind, source, output)
        [counts] = self.query(f"SELECT COUNT(*), COUNT(DISTINCT id) FROM `{output}`")
        self.query(f"DROP TABLE `{output}`")
        if counts != (rows, rows):
            raise RuntimeError(f"{way}: of {rows} rows {counts} are there")
        return Measured(rows, seconds, peak)

    def _service(self, _: str, kind: Kind, source: str, output: str) -> tuple[float, float]:
        with (
            started("service.app:create_app", self.servers.env | AS_IN_THE_IMAGE) as running,
            Held(running.process.pid) as held,
        ):
            running.wait_until_warm()
            start = time.perf_counter()
            running.predict(
                env="dev",
                input_table=source,
                output_table=output,
                model_name=kind.name,
                model_version="v1",
                id_columns="id",
            )
            return time.perf_counter() - start, held.peak

    def _peer(self, way: str, kind: Kind, source: str, output: str) -> tuple[float, float]:
        job = {
            "project": PROJECT,
            "input": source,
            "output": output,
            "model": str(self.place / kind.name),
            "features": list(tables.FEATURES[kind.table]),
            "cores": os.cpu_count(),
        }
        command = [str(self.python), str(ROOT / "benchmarks/contestants.py"), way, json.dumps(job)]
        env = self.servers.environ() | {
            "NO_GCE_CHECK": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Or Ray, under `uv run`, would start its workers in the environment of this project.
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(
                ends_with_us(command), env=env, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
            Held(process.pid) as held,
        ):
            said, _ = process.communicate(timeout=_RUN_SECONDS)
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"{way} failed:\n{log.read()[-4000:]}")
        return json.loads(said.splitlines()[-1])["seconds"], held.peak


async def _query(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    async with open_clients(settings) as clients:
        return await anyio.to_thread.run_sync(
            lambda: [tuple(row) for row in clients.bigquery.query(sql).result()]
        )


@contextmanager
def opened(ways: Sequence[str]) -> Iterator[Bench]:
    python = environment() if set(ways) - {SERVICE} else None
    with local_servers() as servers, tempfile.TemporaryDirectory() as place:
        settings = servers.settings()
        models.publish(settings, models.LINEAR, models.FOREST)
        for kind in (models.LINEAR, models.FOREST):
            Path(place, kind.name).write_bytes(pickle.dumps(kind.fitted()))
        yield Bench(servers, settings, Path(place), python)


def environment() -> Path:
    """The Python of the peers, installed where it is missing or not as uv.lock has it."""
    uv = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    subprocess.run(
        [uv, "sync", "--locked", "--quiet", "--only-group", "peers"],
        # Compiled as it is installed, or the first who imports it would be the slower.
        env=os.environ | {"UV_PROJECT_ENVIRONMENT": str(ENVIRONMENT), "UV_COMPILE_BYTECODE": "1"},
        cwd=ROOT,
        check=True,
    )
    return ENVIRONMENT / "bin" / "python"


# What is measured


@dataclass(frozen=True)
class Plan:
    """How many rows each way gets, and rounds of the two that are compared most closely."""

    rows: int = 2_000_000
    peer_rows: int = 500_000
    row_rows: int = 100_000
    large_rows: int = 20_000_000
    rounds: int = 3

    def cases(self, kind: Kind, ways: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Ways and rows, in the order in which they are measured."""
        # Jobs of seconds differ by a fifth from one to the next.
        for number in range(self.rounds):
            yield from ((way, self.rows) for way in _turn((SERVICE, WHOLE), number) if way in ways)
        for way, rows in (
            (WHOLE_ONCE, self.rows),
            (SERVICE, self.peer_rows),
            (RAY, self.peer_rows),
            (BEAM, self.peer_rows),
            (SERVICE, self.row_rows),
            (BEAM_ROWS, self.row_rows),
        ):
            # Row by row a forest takes too long; a linear model is asked once in any case.
            left_out = rows == self.row_rows if kind is models.FOREST else way == WHOLE_ONCE
            if way in ways and not left_out:
                yield way, rows


def _turn(ways: Sequence[str], number: int) -> Sequence[str]:
    return ways[::-1] if number % 2 else ways


def main() -> None:
    options = _arguments()
    ways = options.ways.split(",")
    plan = Plan(options.rows, options.peer_rows, options.row_rows, options.large, options.rounds)
    if options.quick:
        plan = Plan(100_000, 20_000, 5_000, 200_000, 1)
    # What is not all of it, at full size, is not kept.
    partly = options.quick or set(ways) != set(WAYS) or plan != Plan()
    report = Report("peers", "A table, a model, a table, by several means", partly)
    report.notes.append(
        f"`service` and `whole` at {plan.rows:,} rows: medians of {plan.rounds} rounds by turns. "
        "All others ran once."
    )
    with opened(ways) as bench:
        for way in (SERVICE, WHOLE):
            if way in ways:  # The first who come would pay for what the local server imports.
                bench.measure(way, models.LINEAR, plan.rows)
        medians = {
            kind.name: _measure(bench, report, kind, plan.cases(kind, ways))
            for kind in (models.LINEAR, models.FOREST)
        }
        if plan.large_rows:
            pairs = ((way, plan.large_rows) for way in (SERVICE, WHOLE) if way in ways)
            medians[models.LINEAR.name] |= _measure(bench, report, models.LINEAR, pairs)
    for kind, found in medians.items():
        _check(report, kind, found, plan)
    report.save(lambda figure: _draw(report, figure, plan))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")
    parser.add_argument("--ways", default=",".join(WAYS), help="which of them, by commas")
    parser.add_argument("--rows", type=int, default=Plan.rows)
    parser.add_argument("--peer-rows", type=int, default=Plan.peer_rows, help="for Ray and Beam")
    parser.add_argument("--row-rows", type=int, default=Plan.row_rows, help="for Beam row by row")
    parser.add_argument(
        "--large", type=int, default=Plan.large_rows, help="for memory; 0: leave it out"
    )
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    return parser.parse_args()


def _measure(
    bench: Bench, report: Report, kind: Kind, cases: Iterator[tuple[str, int]]
) -> dict[tuple[str, int], Measured]:
    found: dict[tuple[str, int], list[Measured]] = {}
    for way, rows in cases:
        found.setdefault((way, rows), []).append(bench.measure(way, kind, rows))
    medians = {case: _median(each) for case, each in found.items()}
    for (way, _), median in medians.items():
        report.add(
            way=way,
            model=kind.title,
            rows=median.rows,
            seconds=median.seconds,
            rows_per_second=median.rate,
            peak_mib=median.peak_mib,
        )
    return medians


def _median(each: Sequence[Measured]) -> Measured:
    return Measured(
        each[0].rows,
        statistics.median(one.seconds for one in each),
        statistics.median(one.peak_mib for one in each),
    )


def _check(report: Report, kind: str, found: dict[tuple[str, int], Measured], plan: Plan) -> None:
    """Holds each way against the service: rows a second of as many rows, memory of the most."""
    held = max((one.peak_mib for (way, _), one in found.items() if way == SERVICE), default=0)
    for (way, rows), other in found.items():
        if way == SERVICE or (SERVICE, rows) not in found:
            continue
        times = found[SERVICE, rows].rate / other.rate
        memory = held / other.peak_mib
        if rows == plan.large_rows:
            what = f"{kind}, {rows:,} rows: times as fast as {way}"
            report.check(what, times, least=1.0)
            what = f"{kind}, {rows:,} rows: its memory, of {way}'s"
            report.check(what, memory, most=MOST_MEMORY_LARGE)
            continue
        least = LEAST[kind] if way == WHOLE else 1.0
        report.check(f"{kind}: times as fast as {way}", times, least=least)
        most = MOST_MEMORY if way == WHOLE else 1.0
        report.check(f"{kind}: its memory, of {way}'s", memory, most=most)


def _draw(report: Report, figure: Figure, plan: Plan) -> None:
    told = [row for row in report.rows if row["rows"] != plan.large_rows]
    kinds = list(dict.fromkeys(row["model"] for row in told))
    first = None
    for place, kind in enumerate(kinds):
        first = axes = figure.add_subplot(len(kinds), 1, place + 1, sharex=first)
        rows = [row for row in told if row["model"] == kind]
        rates = [row["rows_per_second"] for row in rows]
        names = [f"{row['way']}, {row['rows'] / 1e6:g} M".replace("_", " ") for row in rows]
        held = axes.barh(names, rates)
        axes.bar_label(held, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=9)
        axes.invert_yaxis()
        axes.set(title=kind, xscale="log")
        axes.tick_params(labelbottom=place == len(kinds) - 1)
    # Room for the figure at the end of the longest bar.
    axes.set_xlim(1000, 4 * max(row["rows_per_second"] for row in told))
    axes.set_xlabel("rows a second, log scale; of so many million rows")


if __name__ == "__main__":
    main()
