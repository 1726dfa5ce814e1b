"""Calls a running service, as the command line and the demo do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2

from mlsys.errors import MlsysError, Unavailable
from mlsys.names import Environment
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
        Refused: the service answered with a problem, or the run failed.
        Unavailable: there is no service, or the connection to it broke.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    parameters = request.model_dump(mode="json", exclude_none=True)
    try:
        with httpx2.Client(timeout=_TIMEOUT, headers=headers) as client:
            return _follow(client, f"{url.rstrip('/')}/predict", parameters, progress)
    except httpx2.HTTPError as error:
        raise Unavailable(f"No answer from {url} ({type(error).__name__}). Is it up?") from error


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
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        with httpx2.Client(timeout=_ANSWER_SECONDS, headers=headers) as client:
            response = client.get(f"{url.rstrip('/')}{path}", params=given)
    except httpx2.HTTPError as error:
        raise Unavailable(f"No answer from {url} ({type(error).__name__}). Is it up?") from error
    if response.status_code != 200:
        raise Refused(_problem(response))
    return response.json()


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
