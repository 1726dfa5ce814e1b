"""What the OpenAPI document promises: calls made up from it are never answered with a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.models import Doubles
from tests.faults.rig import RUNS_BUCKET, Launcher, Process, make_bucket, service_alone
from tests.service.support import numbers, request_for

EXAMPLES = 75
REFUSED_BY_SERVER = b"Invalid HTTP request received."
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
thorough = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def service(servers: LocalServers, launcher: Launcher) -> Iterator[Process]:
    make_bucket(servers, RUNS_BUCKET)
    with service_alone(launcher, servers.env | {"MAX_RUNS": "4"}) as running:
        yield running


@pytest.fixture(scope="module")
def operations(service: Process) -> list[Any]:
    """Every operation of the service's own document."""
    document = service.client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    found = [each.ok() for each in schema.get_all_operations() if isinstance(each, Ok)]
    assert {"GET /predict", "POST /predict", "GET /model-registry"} <= {o.label for o in found}
    return found


@pytest.fixture(scope="module")
def fitting(cloud: Cloud) -> dict[str, Any]:
    """The parameters of a prediction that succeeds."""
    model = cloud.publish(Doubles(), target="Prediction")
    return request_for(cloud.put(numbers(20)), cloud.new_table("openapi"), model)


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_calls_made_up_from_the_document_are_answered_as_it_says(
    service: Process, operations: list[Any], mode: GenerationMode
) -> None:
    with requests.Session() as session:
        for operation in operations:
            if mode is GenerationMode.NEGATIVE and not asks(operation):
                continue

            @thorough
            @given(case=operation.as_strategy(mode))
            def check(case: schemathesis.Case) -> None:
                ask(case, service, session)

            check()


def ask(case: schemathesis.Case, service: Process, session: requests.Session) -> None:
    """Makes a call and compares its answer with the document."""
    response = case.call(base_url=service.url, session=session)
    # The server itself refuses what is no HTTP, such as a line that is longer than it takes.
    by_server = response.status_code == 400 and response.content == REFUSED_BY_SERVER
    case.validate_response(response, checks=[not_a_server_error] if by_server else CHECKS)


def asks(operation: Any) -> bool:
    """Whether there is anything in a call of it that can be wrong."""
    return bool(operation.body or list(operation.iter_parameters()))


def test_calls_that_are_right_but_for_a_few_parameters_are_answered_so_too(
    service: Process, operations: list[Any], fitting: dict[str, Any]
) -> None:
    """Made-up parameters alone seldom get as far as a table or a model."""
    [operation] = [each for each in operations if each.label == "GET /predict"]
    names = st.sets(st.sampled_from(sorted(fitting)), min_size=len(fitting) - 2)
    with requests.Session() as session:

        @thorough
        @given(case=operation.as_strategy(), kept=names)
        def check(case: schemathesis.Case, kept: set[str]) -> None:
            case.query = (case.query or {}) | {name: fitting[name] for name in sorted(kept)}
            ask(case, service, session)

        check()
