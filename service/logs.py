"""Structured logs: JSON with Cloud Logging's field names, human on a terminal.

https://cloud.google.com/logging/docs/structured-logging names the fields; the library's and
uvicorn's own records come out the same way as ours.
"""

from __future__ import annotations

import logging
import logging.config
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = structlog.get_logger(__name__)

# https://cloud.google.com/trace/docs/trace-context
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-[0-9a-f]{2}")
_CLOUD_TRACE = re.compile(r"(?P<trace>[0-9a-f]{32})(?:/(?P<span>\d{1,20}))?(?:;.*)?")


def configure_logging(level: str = "INFO") -> None:
    """Sets up logging for the process, once, before it begins its work."""
    human = sys.stderr.isatty()
    shared = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if human else "iso", utc=not human),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    last = (
        [structlog.dev.ConsoleRenderer()]
        if human
        else [
            structlog.processors.format_exc_info,
            _cloud_logging_names,
            structlog.processors.JSONRenderer(default=str),
        ]
    )
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "structured": {
                    "()": structlog.stdlib.ProcessorFormatter,
                    "processors": [
                        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                        *last,
                    ],
                    "foreign_pre_chain": shared,
                }
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "structured"}},
            "root": {"handlers": ["stderr"], "level": level},
            "loggers": {
                "uvicorn": {"handlers": [], "propagate": True},
                "uvicorn.error": {"handlers": [], "propagate": True},
                # A line a request is written by RequestLog, with the run and the trace in it.
                "uvicorn.access": {"handlers": [], "propagate": False},
            },
        }
    )
    logging.captureWarnings(True)


def log_retries() -> None:
    """Has a line written for each call that is tried again."""
    # Not needed to answer that the service is up, and it takes as long to import as all settings.
    from stamina import instrumentation

    # By itself it looks for somebody to tell at the first retry: imports, on the event loop.
    instrumentation.set_on_retry_hooks([instrumentation.StructlogOnRetryHook])


def _cloud_logging_names(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
    named = {
        "severity": event.pop("level", "info").upper(),
        "message": event.pop("event", ""),
        "time": event.pop("timestamp", None),
    }
    if (exception := event.pop("exception", None)) is not None:
        # Error Reporting finds a stack trace in the message.
        named["message"] = f"{named['message']}\n{exception}"
    return named | event


class RequestLog:
    """ASGI middleware: one line a request, and its trace in every line that the request causes.

    Args:
        project: names the project whose traces they are; None: the trace's id alone is written.
    """

    def __init__(self, app: ASGIApp, project: str | None) -> None:
        self._app = app
        self._project = project

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        start = time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(**_trace(_headers(scope), self._project))
        try:
            await self._app(scope, receive, watch)
        except Exception:
            status = status or 500  # It is answered outside of here.
            raise
        finally:
            self._write(scope, status, time.perf_counter() - start)

    def _write(self, scope: Scope, status: int, seconds: float) -> None:
        # Without the query: a filter may quote a value of a row.
        request = {
            "requestMethod": scope["method"],
            "requestUrl": scope["path"],
            "status": status or None,
            "latency": f"{seconds:.3f}s",
        }
        level = logging.ERROR if status >= 500 else logging.INFO
        _log.log(
            level, f"{scope['method']} {scope['path']} {status or 'no answer'}", httpRequest=request
        )


def _headers(scope: Scope) -> Mapping[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _trace(headers: Mapping[str, str], project: str | None) -> dict[str, str]:
    if match := _TRACEPARENT.fullmatch(headers.get("traceparent", "")):
        trace, span = match["trace"], match["span"]
    elif match := _CLOUD_TRACE.fullmatch(headers.get("x-cloud-trace-context", "")):
        # A decimal number in this header, sixteen hexadecimal digits in Cloud Logging.
        trace, span = match["trace"], f"{int(match['span'] or 0):016x}"
    else:
        return {}
    named = {
        "logging.googleapis.com/trace": f"projects/{project}/traces/{trace}" if project else trace
    }
    return named | ({"logging.googleapis.com/spanId": span} if int(span, 16) else {})
