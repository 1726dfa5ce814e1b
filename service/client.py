"""Calls a running service, as the command line and the demo do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from mlsys.errors import InvalidRequest, MlsysError, Unavailable
from mlsys.names import Environment, shown
from service.contract import (
    PredictRequest,
    PredictResult,
    Problem,
    ProgressEvent,
    RegistryScan,
    RunInfo,
    RunPage,
    RunsRequest,
)

# A run may take the whole hour that Cloud Run gives a request. Once it has started, progress comes
# every half second; before that, a cold instance has to start and a large model to be loaded.
_TIMEOUT = httpx2.Timeout(600, connect=30)
_ANSWER_SECONDS = 300
_TRY_AGAIN = {409, 429, 503}


class Refused(MlsysError):
    """The service answered with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_after = 5 if problem.status in _TRY_AGAIN else None


def predict(
    url: str,
    request: PredictRequest,
    *,
    progress: Callable[[ProgressEvent], None] = lambda event: None,
    token: str | None = None,
) -> PredictResult:
    """Runs a prediction on the service at `url` and waits for its end.

    Args:
        progress: called with each progress event.
        token: an identity token, which a service on Cloud Run asks for.

    Raises:
        InvalidRequest: `url` is not one of http or https.
        Refused: the service answered with a problem, or the run failed.
        Unavailable: there is no service, or the connection to it broke.
    """
    parameters = request.model_dump(mode="json", exclude_none=True)
    with _client(url, token, _TIMEOUT) as client:
        return _follow(client, f"{url.rstrip('/')}/predict", parameters, progress)


def register(url: str, env: Environment, *, token: str | None = None) -> RegistryScan:
    """Has the service at `url` scan the model bucket of `env`; raises as `predict` does."""
    return RegistryScan.model_validate(_get(url, "/model-registry", {"env": str(env)}, token))


def runs(url: str, wanted: RunsRequest, *, token: str | None = None) -> RunPage:
    """The runs of an environment, as the service at `url` tells; raises as `predict` does."""
    return RunPage.model_validate(_get(url, "/runs", wanted.model_dump(mode="json"), token))


def run(url: str, run_id: str, env: Environment, *, token: str | None = None) -> RunInfo:
    """One run, as the service at `url` tells; raises as `predict` does."""
    return RunInfo.model_validate(_get(url, f"/runs/{run_id}", {"env": str(env)}, token))


def _get(url: str, path: str, parameters: dict[str, Any], token: str | None) -> Any:
    given = {name: value for name, value in parameters.items() if value is not None}
    with _client(url, token, httpx2.Timeout(_ANSWER_SECONDS)) as client:
        response = client.get(f"{url.rstrip('/')}{path}", params=given)
    if response.status_code != 200:
        raise Refused(_problem(response))
    return response.json()


@contextmanager
def _client(url: str, token: str | None, timeout: httpx2.Timeout) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx2.Client(timeout=timeout, headers=headers) as client:
            yield client
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise InvalidRequest(
            f"{shown(url)} is not the URL of a service. Write it with its scheme, as "
            "http://host:port or https://host."
        ) from error
    except httpx2.HTTPError as error:
        raise Unavailable(f"No answer from {url} ({type(error).__name__}). Is it up?") from error


def _follow(
    client: httpx2.Client,
    url: str,
    parameters: dict[str, object],
    progress: Callable[[ProgressEvent], None],
) -> PredictResult:
    with client.sse(url, params=parameters) as events:
        if events.response.status_code != 200:
            raise Refused(_problem(events.response))
        for event in events:
            match event.event:
                case "progress":
                    progress(ProgressEvent.model_validate_json(event.data))
                case "result":
                    return PredictResult.model_validate_json(event.data)
                case "error":
                    raise Refused(Problem.model_validate_json(event.data))
    raise Unavailable(f"{url} ended its answer without a result. Call again.")


def _problem(response: httpx2.Response) -> Problem:
    body = response.read()
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        return Problem.model_validate_json(body)
    return Problem(
        type="about:blank",
        title=f"HTTP {response.status_code}",
        status=response.status_code,
        detail=response.reason_phrase,
    )
