"""How long the service takes from the start of its process to its first answers.

    uv run python -m benchmarks.startup [--quick]

Each start is of a fresh process, by the same command as that of a bare FastAPI application; the
two take turns. `/health` is asked for from the first moment, until it is answered. Then the first
run is asked for at once, of a table with a thousand rows, and a second like it; and in another
process a first run after the log has said that all is warmed up. The ratio is the median of those
of the rounds, so that a machine that gets slower meanwhile slows both.
"""

from __future__ import annotations

import http.client
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import anyio
import httpx2
import psutil

from benchmarks import models, tables
from benchmarks.harness import Report, arguments, bars
from benchmarks.storage_server import ROOT
from mlsys.bq import put_table
from mlsys.clients import open_clients
from mlsys.local import DATASET, PROJECT, LocalServers, ends_with_us, free_ports, local_servers
from mlsys.names import TableRef

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

ROUNDS = 3
MOST_RATIO = 1.5
OURS = "service.app:create_app"
BARE = """
from fastapi import FastAPI

def create_app():
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
"""
BARE_APP = "bare:create_app"

_ROWS = 1000
_PATIENCE = 120
_RUN_SECONDS = 3600
_INPUT = f"{PROJECT}.{DATASET}.startup"


@dataclass
class Started:
    """An application in a process of its own, from its first answer on."""

    client: httpx2.Client
    process: subprocess.Popen[bytes]
    log: IO[str]
    began: float
    health_seconds: float
    health_cpu_seconds: float

    def wait_until_warm(self) -> None:
        """Until the log says that nothing is left to import. Only the service says so."""
        while "warmed up" not in Path(self.log.name).read_text():
            time.sleep(0.02)

    def predict(self, **wanted: Any) -> dict[str, Any]:
        """One run.

        Raises:
            RuntimeError: the service answered an error.
        """
        answer = self.client.get("/predict", params=wanted)
        if answer.status_code != 200:
            log = Path(self.log.name).read_text()[-4000:]
            raise RuntimeError(f"{answer.status_code}: {answer.text}\n{log}")
        return answer.json()


@contextmanager
def started(app: str, env: Mapping[str, str], path: str = "") -> Iterator[Started]:
    """Starts an application as an operator does, and waits for the first 200 of `/health`.

    Args:
        env: all that is in its environment beside PATH and the path of its code.
        path: where else there is code.
    """
    places = os.pathsep.join(filter(None, (path, str(ROOT))))
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "--factory", app, "--port", str(port)]
    with (
        # Made before anything is measured: a client reads all certificates that it trusts.
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=_RUN_SECONDS) as client,
        tempfile.NamedTemporaryFile("w+") as log,
    ):
        began = time.perf_counter()
        with subprocess.Popen(
            ends_with_us(command),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": places, "NO_GCE_CHECK": "true"} | env,
            cwd="/",  # A place without an .env.
            stdout=log,
            stderr=log,
        ) as process:
            try:
                _until_healthy(port, process, log)
                took = time.perf_counter() - began
                times = psutil.Process(process.pid).cpu_times()
                yield Started(client, process, log, began, took, times.user + times.system)
            finally:
                process.kill()


def _until_healthy(port: int, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.001)
        finally:
            connection.close()
    raise RuntimeError(f"It did not start:\n{Path(log.name).read_text()[-2000:]}")


def main() -> None:
    options = arguments(__doc__)
    report = Report("startup", "From the start of the process", options.quick)
    rounds = 2 if options.quick else ROUNDS
    with local_servers() as servers, tempfile.TemporaryDirectory() as place:
        Path(place, "bare.py").write_text(BARE)
        _prepare(servers)
        for app in (BARE_APP, OURS):  # What is read from disk for the first time counts for none.
            _health(app, servers, place)
        health: dict[str, list[Started]] = {BARE_APP: [], OURS: []}
        for number in range(rounds):
            for app in sorted(health, reverse=bool(number % 2)):
                health[app].append(_health(app, servers, place))
        runs = [_runs(servers) for _ in range(rounds)]
    _tell(report, health, runs)
    report.save(lambda figure: _draw(report, figure))


def _prepare(servers: LocalServers) -> None:
    settings = servers.settings()
    models.publish(settings, models.LINEAR)

    async def put() -> None:
        async with open_clients(settings) as clients:
            await put_table(clients, settings, _rows(), TableRef.parse(_INPUT))

    anyio.run(put)


def _rows() -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches([tables.made_up(models.LINEAR.table, _ROWS)])


def _health(app: str, servers: LocalServers, place: str) -> Started:
    with started(app, servers.env, place) as running:
        return running


def _runs(servers: LocalServers) -> dict[str, float]:
    """Seconds to the first run's end, and of further runs."""
    with started(OURS, servers.env) as running:
        _predict(running)
        first = time.perf_counter() - running.began
        second = _timed(running)
    with started(OURS, servers.env) as running:
        running.wait_until_warm()
        warm_at = time.perf_counter() - running.began
        warm = _timed(running)
        return {
            "first run, asked for at once": first,
            "all is warmed up": warm_at,
            "of which a first run is, once warmed up": warm,
            "of which any later run is": second,
        }


def _timed(running: Started) -> float:
    start = time.perf_counter()
    _predict(running)
    return time.perf_counter() - start


def _predict(running: Started) -> None:
    running.predict(
        env="dev",
        input_table=_INPUT,
        output_table=f"{PROJECT}.{DATASET}.startup_{time.time_ns()}",
        model_name=models.LINEAR.name,
        model_version="v1",
        id_columns="id",
    )


def _tell(report: Report, health: dict[str, list[Started]], runs: list[dict[str, float]]) -> None:
    names = {BARE_APP: "/health of a bare FastAPI application", OURS: "/health of the service"}
    for app, each in health.items():
        seconds = [one.health_seconds for one in each]
        report.add(
            until=names[app],
            **_spread(seconds),
            cpu_seconds=statistics.median(one.health_cpu_seconds for one in each),
        )
    for name in runs[0]:
        report.add(until=name, **_spread([each[name] for each in runs]), cpu_seconds=None)
    pairs = zip(health[OURS], health[BARE_APP], strict=True)
    ratio = statistics.median(ours.health_seconds / bare.health_seconds for ours, bare in pairs)
    report.check("/health, beside a bare application", ratio, most=MOST_RATIO)
    report.notes.append(
        f"Medians of {len(runs)} rounds by turns, each start a fresh process; the median of the "
        "rounds' ratios."
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(values), "least": min(values), "most": max(values)}


def _draw(report: Report, figure: Figure) -> None:
    shown = report.rows[:4]
    names = ["/health, bare", "/health", "first run,\nat once", "warmed up"]
    axes = bars(figure, names, {"median": [row["seconds"] for row in shown]}, "seconds")
    axes.set_title("From the start of the process")


if __name__ == "__main__":
    main()
