"""Calls a running service, as the command line and the demo do."""

from __future__ import annotations

import re
import ssl
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

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
_TRY_AGAIN = {409, 429, 502, 503, 504}

# https://www.rfc-editor.org/rfc/rfc6750#section-2.1
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class Refused(MlsysError):
    """The service answered with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_after = 5 if problem.status in _TRY_AGAIN else None


class NotTheService(MlsysError):
    """Something else answered: a proxy, a sign-in page, a service of another version."""

    def __init__(self, response: httpx2.Response) -> None:
        url = response.url.copy_with(query=None, userinfo=b"")
        kind = response.headers.get("content-type", "").partition(";")[0] or "no content type"
        super().__init__(
            f"{url} answered {response.status_code} {response.reason_phrase} ({kind}), which is "
            f"no answer of the service. {_advice(response)}"
        )
        self.retry_after = 5 if response.status_code in _TRY_AGAIN else None


def _advice(response: httpx2.Response) -> str:
    if response.status_code in _TRY_AGAIN:
        return "Try again."
    if response.has_redirect_location:
        place = shown(response.headers["location"].partition("?")[0])
        return (
            f"It redirects to {place}. Give the URL of the service itself, and an identity token "
            "with --token or MLSYS_TOKEN if that is a place to sign in."
        )
    if response.status_code not in (401, 403):
        return "Is that the URL of the service, and is its version the one of this command?"
    if "authorization" in response.request.headers:
        return "It does not take the token: one lasts an hour, and its owner has to be an invoker."
    return "It wants an identity token: give one with --token or MLSYS_TOKEN."


def predict(
    url: str,
    request: PredictRequest,
    *,
    progress: Callable[[ProgressEvent], None] = lambda event: None,
    token: str | None = None,
) -> PredictResult:
    """Runs a prediction on the service at `url` and waits for its end.

    A run without an id is given one here: a call may get through twice, and the run may go on where
    its answer did not arrive. An error that another try may help against names it in a note.

    Args:
        progress: called with each progress event.
        token: an identity token, which a service on Cloud Run asks for.

    Raises:
        InvalidRequest: `url` is not one of http or https, or `token` can't be one.
        Refused: the service answered with a problem, or the run failed.
        NotTheService: something else answered.
        Unavailable: there is no service, or the connection to it broke.
    """
    run_id = request.run_id or uuid.uuid4().hex
    parameters = request.model_dump(mode="json", exclude_none=True) | {"run_id": run_id}
    try:
        with _client(url, token, _TIMEOUT) as client:
            return _follow(client, f"{url.rstrip('/')}/predict", parameters, progress)
    except MlsysError as error:
        if getattr(error, "retry_after", None) is not None:
            error.add_note(f"Ask again with the run id {run_id}: that never writes twice.")
        raise


def register(url: str, env: Environment, *, token: str | None = None) -> RegistryScan:
    """Has the service at `url` scan the model bucket of `env`; raises as `predict` does."""
    return _get(RegistryScan, url, "/model-registry", {"env": str(env)}, token)


def runs(url: str, wanted: RunsRequest, *, token: str | None = None) -> RunPage:
    """The runs of an environment, as the service at `url` tells; raises as `predict` does."""
    return _get(RunPage, url, "/runs", wanted.model_dump(mode="json"), token)


def run(url: str, run_id: str, env: Environment, *, token: str | None = None) -> RunInfo:
    """One run, as the service at `url` tells; raises as `predict` does."""
    return _get(RunInfo, url, f"/runs/{quote(run_id, safe='')}", {"env": str(env)}, token)


def _get[M: BaseModel](
    kind: type[M], url: str, path: str, parameters: dict[str, Any], token: str | None
) -> M:
    given = {name: value for name, value in parameters.items() if value is not None}
    with _client(url, token, httpx2.Timeout(_ANSWER_SECONDS)) as client:
        response = client.get(f"{url.rstrip('/')}{path}", params=given)
    if response.status_code != 200:
        raise _refusal(response)
    return _parsed(kind, response.content, response)


@contextmanager
def _client(url: str, token: str | None, timeout: httpx2.Timeout) -> Iterator[httpx2.Client]:
    try:
        with _opened(token, timeout) as client:
            yield client
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise InvalidRequest(
            f"{shown(url)} is not the URL of a service. Write it with its scheme, as "
            "http://host:port or https://host."
        ) from error
    except httpx2.ConnectError as error:
        if _is_about_tls(error):
            raise InvalidRequest(
                f"No TLS with {url} ({error}). Is it served over https, with a certificate that "
                "is trusted here?"
            ) from error
        raise Unavailable(f"No answer from {url} (ConnectError). Is it up?") from error
    except httpx2.HTTPError as error:
        raise Unavailable(
            f"No answer from {url}, or not all of it ({type(error).__name__}). Call again."
        ) from error


def _opened(token: str | None, timeout: httpx2.Timeout) -> httpx2.Client:
    if token and not _TOKEN.fullmatch(token):
        raise InvalidRequest(
            "The token can't be one: it has spaces, line breaks or other characters that none has."
        )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx2.Client(timeout=timeout, headers=headers)
    except (ValueError, ImportError, OSError) as error:
        raise InvalidRequest(
            f"The settings of this machine for HTTP can't be used ({error}). See HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR."
        ) from error


def _is_about_tls(error: BaseException | None) -> bool:
    """Whether the two sides can't agree, and not that one of them hung up."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return not isinstance(error, ssl.SSLEOFError)
        error = error.__cause__ or error.__context__
    return False


def _follow(
    client: httpx2.Client,
    url: str,
    parameters: dict[str, object],
    progress: Callable[[ProgressEvent], None],
) -> PredictResult:
    with client.sse(url, params=parameters) as events:
        response = events.response
        if response.status_code != 200:
            raise _refusal(response)
        try:
            for event in events:
                match event.event:
                    case "progress":
                        progress(_parsed(ProgressEvent, event.data, response))
                    case "result":
                        return _parsed(PredictResult, event.data, response)
                    case "error":
                        raise Refused(_parsed(Problem, event.data, response))
                    case "message":  # Without a name: somebody else's, which may never end.
                        raise NotTheService(response)
        except httpx2.SSEError as error:
            raise NotTheService(response) from error
    raise Unavailable(f"{url} ended its answer without a result. Call again.")


def _refusal(response: httpx2.Response) -> MlsysError:
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        return Refused(_parsed(Problem, response.read(), response))
    return NotTheService(response)


def _parsed[M: BaseModel](kind: type[M], data: str | bytes, response: httpx2.Response) -> M:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise NotTheService(response) from error
