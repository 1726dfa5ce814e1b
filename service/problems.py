"""Errors on the wire: RFC 9457 problem details, the only place that knows HTTP statuses."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from mlsys import errors
from mlsys.errors import MlsysError
from mlsys.names import shown
from service.contract import Problem

MEDIA_TYPE = "application/problem+json"

_PLAIN = re.compile(r"\w{1,80}", re.A)

# The first class that fits, so the more special ones stand first.
_STATUS: tuple[tuple[type[MlsysError], int, str], ...] = (
    (errors.InvalidRequest, 400, "The request is malformed"),
    (errors.AccessDenied, 403, "Not allowed"),
    (errors.NotFound, 404, "Not found"),
    (errors.Conflict, 409, "Already under way"),
    (errors.RunMismatch, 422, "Another run has this id"),
    (errors.TableMismatch, 422, "The table does not fit"),
    (errors.TooManyRuns, 429, "Too many runs"),
    (errors.ModelUnusable, 500, "The model can't be used"),
    (errors.ModelRaised, 500, "The model raised an exception"),
    (errors.IntegrityError, 500, "Rows went missing on the way"),
    (errors.OutOfMemory, 503, "Not enough memory"),
    (errors.Unavailable, 503, "Not available just now"),
)


def problem_of(error: Exception, run_id: str | None = None) -> Problem:
    """What the caller is told of an error. Of one that nobody foresaw, only that it happened."""
    instance = f"/runs/{run_id}" if run_id else None
    for kind, status, title in _STATUS:
        if isinstance(error, kind):
            return Problem(
                type=f"urn:mlsys:{_slug(kind.__name__)}",
                title=title,
                status=status,
                detail=str(error),
                instance=instance,
                **error.members,
            )
    return Problem(
        type="urn:mlsys:internal-error",
        title="Internal error",
        status=500,
        detail="Something went wrong inside the service; its log says what. A run that is asked "
        "for again with its run_id never writes twice.",
        instance=instance,
    )


def example_of(status: int) -> dict[str, Any]:
    """A problem of that status, for the OpenAPI document."""
    error = next(error for error in _EXAMPLES if problem_of(error).status == status)
    return problem_of(error, "nightly-7").model_dump(exclude_none=True)


_EXAMPLES: tuple[MlsysError, ...] = (
    errors.InvalidRequest(
        "input_table: 'titanic_test' is not a table path. Write it as project.dataset.table, with "
        "letters, digits, underscores and hyphens only."
    ),
    errors.AccessDenied("This deployment answers for env=dev only. Call the service of prod."),
    errors.NotFound(
        "gs://mlsys-models-dev has no model named titanic-survival. Upload one as "
        "titanic-survival/v1/model.pkl."
    ),
    errors.UnderWay("The run nightly-7 is under way. Ask for it again, or use another run_id."),
    errors.TableMismatch(
        "my-project.mlsys_dev.titanic_test lacks columns that this run needs: Age, Fare.",
        missing_columns=["Age", "Fare"],
    ),
    errors.TooManyRuns("This instance already has 2 runs under way. Try again later."),
    errors.ModelRaised(
        "The model raised ValueError at row 700,000 of read stream 0 (rows count from 0). "
        "Nothing was written. Exclude such rows with `where`, or publish a model that takes them.",
        exception="ValueError",
        stream=0,
        row=700_000,
    ),
    errors.Unavailable("BigQuery can't be reached just now; try again."),
)


def _slug(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def problem_response(problem: Problem, error: Exception | None = None) -> JSONResponse:
    """The response to send; with `Retry-After` where trying again may help."""
    headers = {}
    if (retry_after := getattr(error, "retry_after", None)) is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=problem.status,
        headers=headers,
        media_type=MEDIA_TYPE,
    )


def add_handlers(app: FastAPI) -> None:
    """Makes every error of the application a problem."""

    @app.exception_handler(MlsysError)
    async def foreseen(_: Request, error: MlsysError) -> JSONResponse:
        return problem_response(problem_of(error), error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        detail = "; ".join(_told(each) for each in error.errors())
        return problem_response(problem_of(errors.InvalidRequest(detail)))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        detail = (
            f"{request.method} on this path is not something this service answers. "
            "See /docs for what it does."
        )
        if error.status_code == 400:
            detail = "The body can't be read: it has to be a JSON object in UTF-8."
        problem = Problem(
            type="about:blank", title=error.detail, status=error.status_code, detail=detail
        )
        response = problem_response(problem)
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(_allowed(request))
        return response

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        # Logged where it is raised again: by the server.
        return problem_response(problem_of(error))


def _allowed(request: Request) -> list[str]:
    """The methods of every route with this path; the framework names those of the first alone."""
    fit = [r for r in request.app.routes if r.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in fit for method in route.methods or ()})


def _told(error: dict[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"The body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if error["loc"] == ("body",):
        return "A body is required: a JSON object, sent as Content-Type: application/json"
    where = ".".join(str(part) for part in _place(error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "there is no such parameter"
    if error["type"] == "missing":
        message = "is required"
    return f"{where}: {message}" if where else message


def _place(loc: Sequence[str | int]) -> Sequence[str | int]:
    return [p if isinstance(p, int) or _PLAIN.fullmatch(p) else shown(p) for p in loc[1:]]
