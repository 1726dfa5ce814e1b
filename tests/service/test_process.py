"""The service as its operator runs it: a process that starts, logs, and ends when told to."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest

from mlsys.local import LocalServers
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import (
    PATIENCE,
    Background,
    ServiceProcess,
    assert_problem,
    numbers,
    process_environment,
    request_for,
    service_process,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"  # pragma: allowlist secret
# What Cloud Run gives a container between SIGTERM and SIGKILL.
GRACE = 10


@pytest.fixture
def process(servers: LocalServers) -> Iterator[ServiceProcess]:
    with service_process(process_environment(**servers.env, READ_STREAMS="1")) as running:
        yield running


def test_it_starts_with_nothing_set_and_ends_when_told_to() -> None:
    # No credentials are looked for over the network: there are none, and none are needed.
    with service_process({"PATH": os.environ["PATH"], "NO_GCE_CHECK": "true"}) as process:
        assert httpx2.get(f"{process.url}/health").json() == {"status": "ok"}
        assert httpx2.get(process.url).json()["service"] == "mlsys"
        process.wait_for_line("clients not opened yet")
        process.process.send_signal(signal.SIGINT)

        assert process.ends(within=GRACE) == 0
    assert process.events[-1]["message"].startswith("Finished server process")
    told = {event["message"]: event["severity"] for event in process.events}
    assert told["clients not opened yet"] == "WARNING"
    assert told["Application shutdown complete."] == "INFO"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_it_ends_at_once_where_nothing_runs(
    process: ServiceProcess, number: signal.Signals
) -> None:
    assert httpx2.get(f"{process.url}/health").status_code == 200

    process.process.send_signal(number)

    assert process.ends(within=GRACE) in ENDED[number]
    assert process.events[-1]["message"].startswith("Finished server process")


# When all is closed, uvicorn passes SIGTERM on to itself: a process with a parent ends by it, one
# that is the first of its container, where the signal does nothing, with 0.
ENDED = {signal.SIGTERM: {0, -signal.SIGTERM}, signal.SIGINT: {0}}


class Pipes:
    """Two named pipes: one says that the model was given rows, one lets it answer."""

    def __init__(self, place: Path) -> None:
        self.entered, self.leave = place / "entered", place / "leave"
        for pipe in (self.entered, self.leave):
            os.mkfifo(pipe)

    def model(self) -> models.ReadsPipes:
        return models.ReadsPipes(str(self.entered), str(self.leave))

    def wait_until_entered(self) -> None:
        Background(self.entered.read_bytes).result()

    def let_go(self) -> None:
        """Fails, rather than to wait for ever, where no model waits."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return os.close(os.open(self.leave, os.O_WRONLY | os.O_NONBLOCK))
            except OSError as error:
                if error.errno != errno.ENXIO or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_run_under_way_ends_before_the_process_and_leaves_nothing(
    process: ServiceProcess, cloud: Cloud, tmp_path: Path, number: signal.Signals
) -> None:
    pipes, output = Pipes(tmp_path), cloud.new_table()
    wanted = request_for(cloud.put(numbers(100)), output, cloud.publish(pipes.model()))
    caller = Background(
        lambda: httpx2.get(f"{process.url}/predict", params=wanted, timeout=PATIENCE)
    )
    pipes.wait_until_entered()

    process.process.send_signal(number)

    # The model is at its rows still, and the caller is told all the same.
    response = caller.result()
    assert_problem(response, 503, "this instance is shutting down", "Nothing was written")
    assert int(response.headers["Retry-After"]) >= 1
    # The process can't end before the model gives its thread back.
    pipes.let_go()
    assert process.ends(within=GRACE) in ENDED[number]
    assert cloud.count(output) == 0


def test_a_follower_of_events_is_told_of_the_end_too(
    process: ServiceProcess, cloud: Cloud, tmp_path: Path
) -> None:
    pipes, output = Pipes(tmp_path), cloud.new_table()
    wanted = request_for(cloud.put(numbers(100)), output, cloud.publish(pipes.model()))
    with (
        httpx2.Client(base_url=process.url, timeout=PATIENCE) as client,
        client.sse("/predict", params=wanted) as source,
    ):
        pipes.wait_until_entered()
        process.process.send_signal(signal.SIGTERM)
        last = list(source)[-1]

    assert last.event == "error"
    assert json.loads(last.data)["status"] == 503
    pipes.let_go()
    assert process.ends(within=GRACE) in ENDED[signal.SIGTERM]
    assert cloud.count(output) == 0


def test_a_model_that_never_answers_does_not_keep_the_process(
    process: ServiceProcess, cloud: Cloud, tmp_path: Path
) -> None:
    pipes, output = Pipes(tmp_path), cloud.new_table()
    wanted = request_for(cloud.put(numbers(100)), output, cloud.publish(pipes.model()))
    caller = Background(
        lambda: httpx2.get(f"{process.url}/predict", params=wanted, timeout=PATIENCE)
    )
    pipes.wait_until_entered()

    process.process.send_signal(signal.SIGTERM)

    assert_problem(caller.result(), 503)
    assert process.ends(within=GRACE) in ENDED[signal.SIGTERM]
    assert cloud.count(output) == 0


def test_what_it_logs_is_what_cloud_logging_reads(
    process: ServiceProcess, cloud: Cloud, tmp_path: Path
) -> None:
    model = cloud.publish(models.Warns())
    wanted = request_for(
        cloud.put(numbers(10)), cloud.new_table(), model, run_id="logged", where="id < 7"
    )
    with httpx2.Client(base_url=process.url, timeout=PATIENCE) as client:
        client.get(
            "/predict", params=wanted, headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        )
        client.get("/nowhere", headers={"X-Cloud-Trace-Context": f"{TRACE}/123;o=1"})
        client.get("/health", headers={"traceparent": "rubbish"})
        client.get("/health?token=hush", headers={"X-Cloud-Trace-Context": '"};--'})
        client.post("/predict", content=b"{")
        client.get("/predict", params=wanted | {"model_name": "nobody", "run_id": "fails"})
    process.process.send_signal(signal.SIGTERM)
    process.ends(within=GRACE)

    assert len(process.events) > 10
    for event in process.events:
        assert event["severity"] in {"INFO", "WARNING", "ERROR"}
        assert event["message"]
        assert abs(datetime.now(UTC) - datetime.fromisoformat(event["time"])).total_seconds() < 600
    predicted, nowhere, health, again, posted, failed = (
        event for event in process.events if "httpRequest" in event
    )
    request = predicted["httpRequest"]
    assert (request["requestMethod"], request["requestUrl"], request["status"]) == (
        "GET",
        "/predict",
        200,
    )
    assert float(request["latency"].removesuffix("s")) > 0
    traced = {
        "run_id": "logged",
        "logging.googleapis.com/trace": f"projects/mlsys-local/traces/{TRACE}",
        "logging.googleapis.com/spanId": "00f067aa0ba902b7",
    }
    of_the_run = [event for event in process.events if event.get("run_id") == "logged"]
    assert predicted in of_the_run
    assert {"run started", "run succeeded", "model loaded"} <= {e["message"] for e in of_the_run}
    for event in of_the_run:
        assert traced.items() <= event.items()
    assert nowhere["logging.googleapis.com/trace"] == f"projects/mlsys-local/traces/{TRACE}"
    assert nowhere["logging.googleapis.com/spanId"] == "000000000000007b"
    assert (nowhere["httpRequest"]["status"], posted["httpRequest"]["status"]) == (404, 400)
    for event in (health, again, posted):
        assert "logging.googleapis.com/trace" not in event
        assert "run_id" not in event
    [reason] = [event for event in process.events if event["message"] == "run failed"]
    assert reason["run_id"] == failed["run_id"] == "fails"
    assert (reason["severity"], reason["error"]) == ("WARNING", "NotFound")
    assert "nobody" in reason["detail"]
    warned = [event for event in process.events if "take care" in event["message"]]
    assert {event["severity"] for event in warned} == {"WARNING"}
    written = "\n".join(process.lines)
    assert "hush" not in written
    assert "id < 7" not in written
    assert "id+%3C" not in written


def test_on_a_terminal_it_writes_for_people(servers: LocalServers) -> None:
    terminal = pty.openpty()

    with service_process(process_environment(**servers.env), terminal) as process:
        httpx2.get(f"{process.url}/health")
        line = process.wait_for_line("GET /health 200")

    assert not line.startswith("{")
    assert "info" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)


def test_it_does_not_start_with_settings_that_make_no_sense() -> None:
    env = process_environment(MLSYS_ENV="qa", CHUNK_ROWS="0", READ_STREAMS="many")

    with pytest.raises(AssertionError) as caught, service_process(env):
        pass

    for name in ("mlsys_env", "chunk_rows", "read_streams"):
        assert name in str(caught.value)


# The command, where it does the service's work itself


@contextmanager
def command(env: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [str(Path(sys.executable).with_name("mlsys")), "predict", *arguments],
        env=env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# The second for schedulers: it may succeed if it is tried again.
STATUS = {signal.SIGINT: {130, 1}, signal.SIGTERM: {75}}


@pytest.mark.parametrize("number", STATUS, ids=lambda each: each.name)
def test_a_command_that_is_ended_leaves_its_run_free(
    servers: LocalServers, service: Client, cloud: Cloud, tmp_path: Path, number: signal.Signals
) -> None:
    pipes, output, run_id = Pipes(tmp_path), cloud.new_table(), cloud.name("run")
    model = cloud.publish(pipes.model())
    wanted = [cloud.put(numbers(100)), output, f"--model={model}", f"--run-id={run_id}"]
    with command(process_environment(**servers.env, READ_STREAMS="1"), *wanted) as process:
        pipes.wait_until_entered()
        process.send_signal(number)
        pipes.let_go()
        assert process.wait(GRACE) in STATUS[number]

    run = service.get(f"/runs/{run_id}").json()
    assert run["state"] == "failed", run
    assert cloud.count(output) == 0


def test_a_run_that_nobody_waits_for_leaves_word_when_the_process_ends(
    process: ServiceProcess, service: Client, cloud: Cloud, tmp_path: Path
) -> None:
    pipes, run_id = Pipes(tmp_path), cloud.name("run")
    wanted = request_for(
        cloud.put(numbers(100)), cloud.new_table(), cloud.publish(pipes.model()), run_id=run_id
    )
    accepted = httpx2.get(
        f"{process.url}/predict", params=wanted, headers={"Prefer": "respond-async"}
    )
    assert accepted.status_code == 202, accepted.text
    pipes.wait_until_entered()

    process.process.send_signal(signal.SIGTERM)
    pipes.let_go()
    process.ends(within=GRACE)

    run = service.get(f"/runs/{run_id}").json()
    assert (run["state"], run["error"]["status"]) == ("failed", 503), run
