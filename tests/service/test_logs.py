"""Log lines as Cloud Logging reads them, one for each request."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.testclient import TestClient

from service.logs import RequestLog, configure_logging

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"  # pragma: allowlist secret
SPAN = "00f067aa0ba902b7"
NAMED = {
    "logging.googleapis.com/trace": f"projects/my-project/traces/{TRACE}",
    "logging.googleapis.com/spanId": SPAN,
}


class Written(io.StringIO):
    """Stands for stderr, a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Written]:
    """What is written to stderr once logging is set up; the logging of before comes back."""
    written = Written(terminal=getattr(request, "param", False))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", written)
    configure_logging()
    yield written
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()


def test_our_own_lines_and_those_of_libraries_come_out_alike(stderr: Written) -> None:
    structlog.get_logger("service.runs").warning("run failed", rows=5)
    logging.getLogger("somebody.else").warning("%s went %s", "all", "wrong")

    ours, theirs = stderr.events()
    assert (ours["severity"], ours["message"], ours["rows"]) == ("WARNING", "run failed", 5)
    assert (theirs["severity"], theirs["message"]) == ("WARNING", "all went wrong")
    assert (ours["logger"], theirs["logger"]) == ("service.runs", "somebody.else")
    assert ours["time"].endswith("Z")
    assert theirs["time"].endswith("Z")


def test_a_stack_trace_is_in_the_message_where_error_reporting_looks_for_it(
    stderr: Written,
) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        structlog.get_logger().exception("run failed")
        logging.getLogger("somebody.else").exception("it failed")

    for event, first in zip(stderr.events(), ("run failed", "it failed"), strict=True):
        assert event["severity"] == "ERROR"
        assert event["message"].startswith(f"{first}\nTraceback (most recent call last)")
        assert event["message"].endswith("ValueError: no")


def test_a_warning_is_a_line_too(stderr: Written) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("take care", UserWarning, stacklevel=1)

    [event] = stderr.events()
    assert event["severity"] == "WARNING"
    assert "take care" in event["message"]


def test_what_has_no_form_in_json_is_written_all_the_same(stderr: Written) -> None:
    structlog.get_logger().info("odd", thing={1}, kind=ValueError)

    [event] = stderr.events()
    assert event["thing"] == "{1}"


def test_a_line_break_in_a_message_does_not_break_the_line(stderr: Written) -> None:
    structlog.get_logger().info('a\n{"severity": "EMERGENCY"}')

    [event] = stderr.events()
    assert event["severity"] == "INFO"


def test_details_for_developers_are_left_out(stderr: Written) -> None:
    logging.getLogger("somebody.else").debug("hush")

    assert not stderr.getvalue()


@pytest.mark.parametrize("stderr", [True], indirect=True)
def test_on_a_terminal_lines_are_for_people(stderr: Written) -> None:
    structlog.get_logger("service.runs").warning("run failed", rows=5)

    line = stderr.getvalue()
    assert "run failed" in line
    assert not line.startswith("{")


@pytest.fixture
def app(stderr: Written) -> TestClient:
    app = FastAPI()
    app.add_middleware(RequestLog, project="my-project")

    @app.get("/fine")
    async def fine() -> None:
        structlog.get_logger().info("at work")
        structlog.contextvars.bind_contextvars(run_id="nightly-7")

    @app.get("/status/{status}")
    async def answer(status: int) -> PlainTextResponse:
        return PlainTextResponse("…", status)

    @app.get("/raises")
    async def fail() -> None:
        raise RuntimeError("no")

    return TestClient(app, raise_server_exceptions=False)


def lines(stderr: Written, logger: str = "service.logs") -> list[dict[str, Any]]:
    return [event for event in stderr.events() if event["logger"] == logger]


def test_a_request_is_one_line_without_its_query(app: TestClient, stderr: Written) -> None:
    app.get("/fine?where=hush")

    [line] = lines(stderr)
    assert line["message"] == "GET /fine 200"
    assert line["severity"] == "INFO"
    latency = line["httpRequest"].pop("latency")
    assert float(latency.removesuffix("s")) >= 0
    assert line["httpRequest"] == {
        "requestMethod": "GET",
        "requestUrl": "/fine",
        "status": 200,
    }
    assert line["run_id"] == "nightly-7"
    assert "hush" not in "".join(json.dumps(each) for each in lines(stderr))


@pytest.mark.parametrize(("status", "severity"), [(404, "INFO"), (429, "INFO"), (503, "ERROR")])
def test_only_what_the_service_failed_at_is_an_error(
    app: TestClient, stderr: Written, status: int, severity: str
) -> None:
    app.get(f"/status/{status}")

    assert [line["severity"] for line in lines(stderr)] == [severity]


def test_a_request_that_nobody_foresaw_is_an_error(app: TestClient, stderr: Written) -> None:
    assert app.get("/raises").status_code == 500

    [line] = lines(stderr)
    assert line["severity"] == "ERROR"
    assert line["httpRequest"]["status"] == 500


@pytest.mark.parametrize(
    ("header", "value", "named"),
    [
        ("traceparent", f"00-{TRACE}-{SPAN}-01", NAMED),
        ("X-Cloud-Trace-Context", f"{TRACE}/{int(SPAN, 16)};o=1", NAMED),
        ("X-Cloud-Trace-Context", f"{TRACE}/{int(SPAN, 16)}", NAMED),
        (
            "X-Cloud-Trace-Context",
            TRACE,
            dict([*NAMED.items()][:1]),
        ),
        ("traceparent", f"00-{TRACE.upper()}-{SPAN}-01", {}),
        ("traceparent", f"00-{TRACE}-{SPAN}", {}),
        ("traceparent", "", {}),
        ("X-Cloud-Trace-Context", "x/1;o=1", {}),
        ("X-Cloud-Trace-Context", f"{TRACE}/-1", {}),
    ],
)
def test_the_trace_of_a_request_is_in_all_its_lines(
    app: TestClient, stderr: Written, header: str, value: str, named: dict[str, str]
) -> None:
    app.get("/fine", headers={header: value})

    written = [event for event in stderr.events() if not event["logger"].startswith("http")]
    assert [event["message"] for event in written] == ["at work", "GET /fine 200"]
    for event in written:
        traced = {name: told for name, told in event.items() if name.startswith("logging.")}
        assert traced == named


def test_the_trace_of_one_request_is_not_in_the_lines_of_the_next(
    app: TestClient, stderr: Written
) -> None:
    app.get("/fine", headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    app.get("/status/204")

    last = lines(stderr)[-1]
    assert not [name for name in last if name.startswith("logging.")]
    assert "run_id" not in last
