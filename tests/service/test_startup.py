"""What a process does before its engine is there: it answers, waits, and ends when told to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from mlsys.errors import Unavailable
from mlsys.local import LocalServers
from mlsys.settings import Settings
from service.startup import Startup, starting
from tests.conftest import Cloud
from tests.service import models
from tests.service.support import (
    PATIENCE,
    ROOT,
    Background,
    ServiceProcess,
    assert_problem,
    numbers,
    process_environment,
    request_for,
    service_process,
)
from tests.service.test_process import ENDED, GRACE, Pipes

# For a run of a few rows, seconds.
LONG_ENOUGH = 1

HEAVY = {
    "aiohttp",
    "gcloud",
    "google",
    "grpc",
    "numpy",
    "pandas",
    "polars",
    "pyarrow",
    "scipy",
    "sklearn",
}

FIRST_HEALTH = """
import asyncio, json, sys
from service.app import create_app

async def health(app):
    messages = []
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}
    async def send(message):
        messages.append(message)
    scope = {
        "type": "http", "method": "GET", "path": "/health", "raw_path": b"/health", "headers": [],
        "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
    }
    await app(scope, receive, send)
    return messages[0]["status"]

status = asyncio.run(health(create_app()))
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""

# Stands before a package on the path: says that it is being imported, waits to be let go, and then
# becomes the package that it stands before, or fails as one that is broken.
GATE = """
import importlib.machinery, sys
open({entered!r}, "w").close()
open({leave!r}).read()
if {broken}:
    raise ImportError("it is broken")
elsewhere = [place for place in sys.path if place != {here!r}]
__spec__ = importlib.machinery.PathFinder.find_spec(__name__, elsewhere)
__path__ = __spec__.submodule_search_locations
__file__ = __spec__.origin
__spec__.loader.exec_module(sys.modules[__name__])
"""


def gated(package: str, pipes: Pipes, place: Path, *, broken: bool) -> dict[str, str]:
    """The environment of a process that waits where it imports a package."""
    (place / package).mkdir()
    (place / package / "__init__.py").write_text(
        GATE.format(
            entered=str(pipes.entered), leave=str(pipes.leave), broken=broken, here=str(place)
        )
    )
    return process_environment() | {"PYTHONPATH": f"{place}:{ROOT}", "NO_GCE_CHECK": "true"}


def health(process: ServiceProcess) -> int:
    return httpx2.get(f"{process.url}/health", timeout=PATIENCE).status_code


def asked(process: ServiceProcess, wanted: dict[str, Any]) -> Background:
    """A call for a run, on its way."""
    return Background(lambda: httpx2.get(f"{process.url}/predict", params=wanted, timeout=PATIENCE))


def test_health_is_answered_before_anything_heavy_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_HEALTH],
        env=process_environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    status, loaded = json.loads(done.stdout)
    assert status == 200
    assert HEAVY & set(loaded) == set()


def test_a_run_asked_for_at_once_waits_for_the_engine(
    servers: LocalServers, cloud: Cloud, tmp_path: Path
) -> None:
    pipes, output = Pipes(tmp_path), cloud.new_table()
    wanted = request_for(cloud.put(numbers(100)), output, cloud.publish(models.Doubles()))
    env = gated("grpc", pipes, tmp_path, broken=False)

    with service_process(env | servers.env) as process:
        caller = asked(process, wanted)
        pipes.wait_until_entered()
        assert health(process) == 200
        pipes.let_go()

        assert caller.result().json()["rows"] == cloud.count(output) == 100


def test_a_model_is_not_loaded_while_scikit_learn_is_imported(
    servers: LocalServers, cloud: Cloud, tmp_path: Path
) -> None:
    pipes, output = Pipes(tmp_path), cloud.new_table()
    wanted = request_for(cloud.put(numbers(100)), output, cloud.publish(models.Doubles()))
    env = gated("sklearn", pipes, tmp_path, broken=False)

    with service_process(env | servers.env) as process:
        pipes.wait_until_entered()
        caller = asked(process, wanted)
        time.sleep(LONG_ENOUGH)
        pipes.let_go()

        assert caller.result().json()["rows"] == cloud.count(output) == 100
        process.wait_for_line("run succeeded")
    said = [event["message"] for event in process.events]
    assert said.index("warmed up") < said.index("model loaded")


def test_health_is_answered_while_scikit_learn_is_imported(tmp_path: Path) -> None:
    pipes = Pipes(tmp_path)

    with service_process(gated("sklearn", pipes, tmp_path, broken=True)) as process:
        pipes.wait_until_entered()
        assert health(process) == 200
        process.process.send_signal(signal.SIGTERM)

        assert process.ends(within=GRACE) in ENDED[signal.SIGTERM]
    assert process.events[-1]["message"].startswith("Finished server process")


WARMED_UP = """
import gc
import anyio
from mlsys.settings import Settings
from service.startup import starting

async def main():
    async with starting(Settings(_env_file=None)) as startup:
        await startup.engine()
        while gc.get_freeze_count() < 10_000:  # Python itself has some hundred.
            await anyio.sleep(0.01)
        print(gc.get_freeze_count(), len(gc.get_objects()))

anyio.run(main)
"""


def test_what_is_imported_is_nothing_that_garbage_is_looked_for_in() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WARMED_UP],
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE,
    )

    kept_out, looked_through = map(int, done.stdout.splitlines()[-1].split())
    assert looked_through < kept_out / 10


def test_an_import_under_way_is_waited_for_where_the_interpreter_ends(tmp_path: Path) -> None:
    pipes = Pipes(tmp_path)

    with service_process(gated("sklearn", pipes, tmp_path, broken=True)) as process:
        pipes.wait_until_entered()
        process.process.send_signal(signal.SIGINT)
        process.wait_for_line("Finished server process")
        pipes.let_go()

        assert process.ends(within=GRACE) == 0
    assert "Traceback" not in "\n".join(process.lines)


def test_a_library_that_can_not_be_imported_is_logged_and_missed_by_none(tmp_path: Path) -> None:
    pipes = Pipes(tmp_path)

    with service_process(gated("sklearn", pipes, tmp_path, broken=True)) as process:
        pipes.wait_until_entered()
        pipes.let_go()
        event = json.loads(process.wait_for_line("not imported ahead of the first run"))

        assert health(process) == 200
    assert (event["severity"], event["module"]) == ("WARNING", "sklearn.pipeline")
    assert "it is broken" in event["message"]


def test_without_its_engine_a_service_is_up_and_says_that_no_run_can_start(
    tmp_path: Path,
) -> None:
    pipes = Pipes(tmp_path)

    with service_process(gated("grpc", pipes, tmp_path, broken=True)) as process:
        pipes.wait_until_entered()
        pipes.let_go()
        event = json.loads(process.wait_for_line("engine not imported"))
        response = httpx2.get(f"{process.url}/runs", params={"env": "dev"}, timeout=PATIENCE)

        assert_problem(response, 500, "Something went wrong inside the service")
        assert health(process) == 200
    assert event["severity"] == "ERROR"
    assert "it is broken" in event["message"]


@pytest.mark.anyio
async def test_who_waits_for_the_engine_is_sent_away_where_the_service_ends(
    settings: Settings,
) -> None:
    startup = Startup(settings)

    async def wait() -> None:
        with pytest.raises(Unavailable, match=r"Not begun: it rains\. Nothing was written"):
            await startup.engine()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        startup.end("it rains")


@pytest.mark.anyio
async def test_once_told_to_end_it_starts_nothing_more(settings: Settings) -> None:
    async with starting(settings) as startup:
        await startup.engine()
        startup.end("it rains")

        with pytest.raises(Unavailable, match="it rains"):
            await startup.engine()
