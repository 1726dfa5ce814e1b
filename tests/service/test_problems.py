"""Every error has a status, and says no more than it should."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from mlsys import errors
from service.client import NotTheService, Refused
from service.contract import Problem
from service.problems import add_handlers, problem_of, problem_response
from tests.service.support import assert_problem

STATUS = {
    errors.InvalidRequest: 400,
    errors.AccessDenied: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TableMismatch: 422,
    errors.TooManyRuns: 429,
    errors.ModelUnusable: 500,
    errors.ModelRaised: 500,
    errors.IntegrityError: 500,
    errors.Unavailable: 503,
}


def leaves(kind: type) -> set[type]:
    """The classes below `kind` that have none below themselves."""
    below = kind.__subclasses__()
    return set().union(*map(leaves, below)) if below else {kind}


def test_every_error_of_the_project_has_a_status() -> None:
    # What a caller makes of an answer is nothing that the service itself raises.
    for kind in leaves(errors.MlsysError) - {NotTheService, Refused}:
        assert problem_of(kind("…")).type != "urn:mlsys:internal-error", kind


@pytest.mark.parametrize(("kind", "status"), STATUS.items())
def test_an_error_is_told_with_its_message_and_members(
    kind: type[errors.MlsysError], status: int
) -> None:
    problem = problem_of(kind("Mend it so.", columns=["a"]), "nightly-7")

    assert problem.status == status
    assert problem.type.startswith("urn:mlsys:")
    assert problem.title
    assert problem.detail == "Mend it so."
    assert problem.instance == "/runs/nightly-7"
    assert problem.columns == ["a"]


def test_no_two_kinds_of_error_have_one_type() -> None:
    types = {problem_of(kind("…")).type for kind in STATUS}

    assert len(types) == len(STATUS)
    assert "urn:mlsys:table-mismatch" in types


def test_an_error_that_nobody_foresaw_tells_nothing_of_itself() -> None:
    problem = problem_of(ValueError("hush"), "nightly-7")

    assert problem.status == 500
    assert "hush" not in problem.model_dump_json()
    assert "log" in problem.detail


@pytest.mark.parametrize("kind", [errors.TooManyRuns, errors.Unavailable])
def test_what_passes_by_itself_says_when_to_try_again(kind: type[errors.MlsysError]) -> None:
    error = kind("Try again.", retry_after=1.2)

    assert problem_response(problem_of(error), error).headers["Retry-After"] == "2"


def test_what_does_not_pass_by_itself_does_not_say_so() -> None:
    error = errors.NotFound("Look elsewhere.")

    assert "Retry-After" not in problem_response(problem_of(error), error).headers


def test_members_that_are_not_there_are_left_out() -> None:
    body = json.loads(problem_response(problem_of(errors.NotFound("Look elsewhere."))).body)

    assert set(body) == {"type", "title", "status", "detail"}
    assert Problem.model_validate(body).instance is None


@pytest.fixture(scope="module")
def app() -> TestClient:
    """An application whose handlers fail in every way."""
    app = FastAPI()
    add_handlers(app)

    @app.get("/foreseen")
    async def foreseen() -> None:
        raise errors.Unavailable("Try again.", retry_after=7)

    @app.get("/unforeseen")
    async def unforeseen() -> None:
        raise RuntimeError("hush")

    @app.get("/refused")
    async def refused() -> None:
        raise HTTPException(418, "A teapot", headers={"X-Tea": "green"})

    @app.put("/refused")
    async def put(number: int) -> None: ...

    return TestClient(app, raise_server_exceptions=False)


def test_an_error_of_a_handler_is_a_problem(app: TestClient) -> None:
    response = app.get("/foreseen")

    assert_problem(response, 503, "Try again.")
    assert response.headers["Retry-After"] == "7"


def test_an_unforeseen_error_of_a_handler_is_a_problem_too(app: TestClient) -> None:
    assert_problem(app.get("/unforeseen"), 500, "its log says what")


def test_what_the_framework_refuses_is_a_problem_with_its_headers(app: TestClient) -> None:
    response = app.get("/refused")

    assert_problem(response, 418)
    assert response.headers["X-Tea"] == "green"


def test_the_methods_of_all_routes_of_a_path_are_told(app: TestClient) -> None:
    assert app.delete("/refused").headers["Allow"] == "GET, PUT"


@pytest.mark.parametrize("name", ["a" * 500, "a\x00b", "a\nb", "a`b", "ключ", "\u202egnp"])
def test_the_name_of_an_unknown_parameter_is_repeated_with_care(
    service: TestClient, name: str
) -> None:
    problem = assert_problem(service.get("/predict", params={name: "1"}), 400, "no such parameter")

    assert name not in problem["detail"] or name == "a`b"
