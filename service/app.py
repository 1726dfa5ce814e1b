"""The HTTP service.

uvicorn --factory service.app:create_app --host 0.0.0.0 --port 8080
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import structlog
from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from mlsys.names import Environment
from mlsys.settings import Settings
from service.contract import (
    RUN_ID_PATTERN,
    About,
    Health,
    PredictRequest,
    PredictResult,
    Problem,
    ProgressEvent,
    RegistryRequest,
    RegistryScan,
    RunInfo,
    RunPage,
    RunsRequest,
)
from service.logs import RequestLog, configure_logging
from service.problems import (
    MEDIA_TYPE,
    add_handlers,
    example_of,
    problem_of,
    problem_response,
)
from service.startup import Startup, starting

if TYPE_CHECKING:
    from service.engine import Engine
    from service.runs import Run

EVENT_STREAM = "text/event-stream"
RESPOND_ASYNC = "respond-async"
# Nobody's mistake, so not among the errors of the log; the status is the one that nginx uses.
CALLER_CLOSED = 499
CALLER_GONE, SHUTTING_DOWN = "the caller went away", "this instance is shutting down"

_log = structlog.get_logger(__name__)

# How soon a model in pure Python has to let the event loop have the interpreter. Seen beside two of
# them: /health answers in 9 ms, and in 36 ms with Python's own 5 ms; they take no longer.
_SWITCH_SECONDS = 0.001


def create_app(settings: Settings | None = None) -> FastAPI:
    """Makes the application; settings come from the environment where none are given."""
    settings = settings or Settings()
    configure_logging()
    sys.setswitchinterval(_SWITCH_SECONDS)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with starting(settings) as startup:
            app.state.startup = startup
            with _runs_end_on_signals(startup):
                yield

    app = FastAPI(
        title="mlsys",
        summary="Batch predictions: a BigQuery table in, a model, a BigQuery table out.",
        version=version("mlsys"),
        lifespan=lifespan,
    )
    add_handlers(app)
    add_routes(app)
    app.add_middleware(RequestLog, project=settings.gcp_project_id)
    return app


@contextmanager
def _runs_end_on_signals(startup: Startup) -> Iterator[None]:
    """Ends the runs as soon as the process is told to stop.

    The server itself would wait for its requests, and Cloud Run kills ten seconds after SIGTERM.
    A run that ends at once can still tell its caller, and leaves nothing behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    servers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(startup.end, SHUTTING_DOWN)
        servers[number](number, frame)

    handled = [number for number, handler in servers.items() if callable(handler)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, servers[number])


async def _engine(request: Request) -> Engine:
    return await request.app.state.startup.engine()


CurrentEngine = Annotated["Engine", Depends(_engine)]
Accept = Annotated[str, Header(description=f"`{EVENT_STREAM}` for progress as it happens")]
Prefer = Annotated[
    tuple[str, ...],
    Header(description=f"`{RESPOND_ASYNC}` for 202 at once, and the run at `Location`"),
]


async def _each_once(request: Request) -> None:
    """Raises RequestValidationError for parameters given twice: which one is meant is a guess."""
    times = Counter(name for name, _ in request.query_params.multi_items())
    if again := [name for name in times if times[name] > 1 and name != "id_columns"]:
        message = "is given more than once. Give it once"
        raise RequestValidationError(
            [{"type": "repeated", "loc": ("query", name), "msg": message} for name in again]
        )


async def _in_the_body(request: Request) -> None:
    """Raises RequestValidationError for a query: a run id that is not heeded keeps no promise."""
    if names := dict.fromkeys(request.query_params):
        message = "belongs into the body, with every other parameter"
        raise RequestValidationError(
            [{"type": "misplaced", "loc": ("query", name), "msg": message} for name in names]
        )


_EACH_ONCE = [Depends(_each_once)]

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    # Not as a `model`, which would be documented as plain application/json.
    status: {
        "description": meaning,
        "content": {
            MEDIA_TYPE: {"schema": Problem.model_json_schema(), "example": example_of(status)}
        },
    }
    for status, meaning in {
        400: "A name or a parameter is malformed",
        403: "Not allowed",
        404: "No such table, model or version",
        409: "That run is under way",
        422: "A table does not fit: the columns are listed",
        429: "Too many runs: try again after `Retry-After` seconds",
        500: "The model can't be loaded, or raised: its exception, and at which row",
        503: "BigQuery or Cloud Storage is not available: try again after `Retry-After` seconds",
    }.items()
}
_READ_PROBLEMS: dict[int | str, dict[str, Any]] = {
    **{status: _PROBLEMS[status] for status in (400, 403, 404, 503)},
    "default": {"description": "Any other problem", "content": _PROBLEMS[503]["content"]},
}
_EVENTS = """\
event: progress
data: {"run_id":"nightly-7","rows_done":131,"rows_total":262, …}

event: result
data: {"status":"succeeded","run_id":"nightly-7","rows":262, …}

"""
_PREDICT: dict[str, Any] = {
    "response_model": PredictResult,
    "tags": ["predict"],
    "responses": {
        200: {
            "description": "Every row is predicted and appended. As an event stream: `progress` "
            "events, then one `result` or `error`.",
            "content": {EVENT_STREAM: {"schema": {"type": "string"}, "example": _EVENTS}},
        },
        202: {
            "model": ProgressEvent,
            "description": "The run has begun; `Location` tells how it is",
        },
        **_PROBLEMS,
    },
}


def add_routes(app: FastAPI) -> None:
    """Adds what the service answers."""

    @app.get("/predict", summary="Predict a table", dependencies=_EACH_ONCE, **_PREDICT)
    async def predict(
        request: Request,
        wanted: Annotated[PredictRequest, Query()],
        engine: CurrentEngine,
        accept: Accept = "*/*",
        prefer: Prefer = (),
    ) -> Response:
        """Reads the input table, predicts it chunk by chunk, appends the result: all or nothing.

        The call lasts as long as the run, unless `Prefer` asks for an answer at once. Where the
        caller goes away the run ends, and nothing is appended. With a `run_id` the call may be
        repeated, also while it is not known how it ended: it never writes twice.
        """
        return await _answer(engine.start(wanted), request, engine.settings, accept, prefer)

    @app.post(
        "/predict",
        summary="Predict a table, asked for in JSON",
        dependencies=[Depends(_in_the_body)],
        **_PREDICT,
    )
    async def predict_json(
        request: Request,
        wanted: PredictRequest,
        engine: CurrentEngine,
        accept: Accept = "*/*",
        prefer: Prefer = (),
    ) -> Response:
        """The same as `GET /predict`, with the parameters as a JSON object."""
        return await _answer(engine.start(wanted), request, engine.settings, accept, prefer)

    @app.get(
        "/runs/{run_id}",
        summary="How is a run?",
        tags=["runs"],
        dependencies=_EACH_ONCE,
        responses=_READ_PROBLEMS,
    )
    async def run(
        run_id: Annotated[str, Path(pattern=RUN_ID_PATTERN)],
        engine: CurrentEngine,
        env: Annotated[
            Environment | None, Query(description="Whose; by default this deployment's")
        ] = None,
    ) -> RunInfo:
        """Its state, its progress, and its result or its error."""
        return await engine.find_run(run_id, env)

    @app.get(
        "/runs",
        summary="The latest runs",
        tags=["runs"],
        dependencies=_EACH_ONCE,
        responses=_READ_PROBLEMS,
    )
    async def runs(engine: CurrentEngine, wanted: Annotated[RunsRequest, Query()]) -> RunPage:
        """Newest first, a page at a time."""
        return await engine.list_runs(wanted)

    @app.get(
        "/model-registry",
        summary="Register what is in the model bucket",
        tags=["registry"],
        dependencies=_EACH_ONCE,
        responses={status: _PROBLEMS[status] for status in (400, 403, 404, 422, 503)},
    )
    async def model_registry(
        wanted: Annotated[RegistryRequest, Query()], engine: CurrentEngine
    ) -> RegistryScan:
        """Upserts the registry table from the bucket: a row a model, marked once it is deleted.

        What is no model is named with the reason. A metadata.json that can't be used is skipped;
        the model beside it is registered all the same. Repeating the call is harmless.
        """
        return await engine.register(wanted.env)

    @app.get("/health", summary="Is the service up?", tags=["service"])
    async def health() -> Health:
        """Answers at once and asks no other service."""
        return Health()

    @app.get("/", summary="What is this?", tags=["service"])
    async def about() -> About:
        """Names the service, its version and its documentation."""
        return About(version=app.version, documentation=app.docs_url or "")


async def _answer(
    run: Run, request: Request, settings: Settings, accept: str, prefer: Sequence[str]
) -> Response:
    streams, at_once = EVENT_STREAM in accept, _wants_no_wait(prefer)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_end_when_gone, run, request)
        # A run that can't start is answered with its status; what follows comes as events.
        await (run.begun if streams or at_once else run.ended).wait()
        tasks.cancel_scope.cancel()
    if run.ended_because == CALLER_GONE:
        return Response(status_code=CALLER_CLOSED)  # For the log alone: nobody is there to read it.
    if run.error is not None:
        return problem_response(problem_of(run.error, run.id), run.error)
    if at_once and run.result is None:
        return _accepted(run)
    if streams:
        return RunEvents(run, settings.progress_seconds)
    return JSONResponse(run.result.model_dump(mode="json"))


def _wants_no_wait(prefer: Sequence[str]) -> bool:
    """Whether a preference among those of every line is `respond-async` (RFC 7240, section 2)."""
    preferences = (each.partition(";")[0] for line in prefer for each in line.split(","))
    return RESPOND_ASYNC in (each.strip().lower() for each in preferences)


def _accepted(run: Run) -> Response:
    """The run goes on by itself; its journal tells how."""
    # With the environment: in that of another, a run may have the same id.
    location = f"/runs/{run.id}?env={run.request.env}"
    return JSONResponse(
        run.progress().model_dump(mode="json"),
        status_code=202,
        headers={"Location": location, "Preference-Applied": RESPOND_ASYNC},
    )


async def _end_when_gone(run: Run, request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    run.cancel(CALLER_GONE)


class RunEvents(StreamingResponse):
    """The progress of a run as server-sent events, then its result or its error.

    The run ends with the response: a caller who goes away ends it.
    """

    media_type = EVENT_STREAM

    def __init__(self, run: Run, interval: float) -> None:
        super().__init__(self._events(run, interval), headers={"Cache-Control": "no-store"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.cancel(CALLER_GONE)

    @staticmethod
    async def _events(run: Run, interval: float) -> AsyncIterator[bytes]:
        while not run.ended.is_set():
            yield _event("progress", run.progress())
            with anyio.move_on_after(interval):
                await run.ended.wait()
        yield _event("progress", run.progress())
        if run.result is not None:
            yield _event("result", run.result)
        else:
            yield _event("error", problem_of(run.error, run.id))


def _event(name: str, data: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data.model_dump_json(exclude_none=name == "error"))
