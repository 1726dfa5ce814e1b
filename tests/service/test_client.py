"""The client against the real service, and against servers that misbehave."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from sklearn.linear_model import LinearRegression

from mlsys.errors import InvalidRequest, Unavailable
from mlsys.names import Environment
from service import client
from service.client import NotTheService, Refused, predict, register
from service.contract import PredictRequest, ProgressEvent, RunsRequest
from tests.conftest import Client, Cloud
from tests.service.support import hanging_up, server_that_says


def wanted(input_table: str, output_table: str, model: str) -> PredictRequest:
    return PredictRequest(
        env="dev",
        input_table=input_table,
        output_table=output_table,
        model_name=model,
        model_version="latest",
    )


def test_progress_is_told_and_the_result_returned(service: Client, cloud: Cloud) -> None:
    rows = pa.table({"id": range(100), "x": [float(i) for i in range(100)]})
    frame = rows.select(["x"]).to_pandas()
    model = cloud.publish(LinearRegression().fit(frame, frame["x"]))
    events: list[ProgressEvent] = []

    result = predict(
        str(service.base_url),
        wanted(cloud.put(rows), cloud.new_table(), model),
        progress=events.append,
    )

    assert result.rows == 100
    assert events[-1].rows_done == 100
    assert {event.run_id for event in events} == {result.run_id}


def test_a_problem_is_raised_with_all_its_members(service: Client, cloud: Cloud) -> None:
    rows = pa.table({"id": [1], "y": [1.0]})
    frame = pa.table({"x": [1.0, 2.0]}).to_pandas()
    model = cloud.publish(LinearRegression().fit(frame, frame["x"]))

    with pytest.raises(Refused, match="lacks columns") as caught:
        predict(str(service.base_url), wanted(cloud.put(rows), cloud.new_table(), model))

    assert caught.value.problem.status == 422
    assert caught.value.problem.missing_columns == ["x"]


ANYTHING = wanted("my-project.a.b", "my-project.a.c", "m")
ASKED = {
    "predict": lambda url, **token: predict(url, ANYTHING, **token),
    "register": lambda url, **token: register(url, Environment.DEV, **token),
    "runs": lambda url, **token: client.runs(url, RunsRequest(env="dev"), **token),
    "run": lambda url, **token: client.run(url, "nightly-7", Environment.DEV, **token),
}
EVENT = "text/event-stream"


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (200, "text/html", b"<html>Sign in</html>"),
        (200, "application/json", b'{"hello": "world"}'),
        (200, "application/json", b"[1, 2"),
        (200, "application/json", b"\xff"),
        (200, "", b""),
        (204, "text/plain", b""),
        (404, "text/html", b"<html>Not here</html>"),
        (404, "application/problem+json", b'{"error": "of another kind"}'),
        (500, "application/problem+json", b"<html>no JSON</html>"),
        (200, EVENT, b"data: a message\n\n"),
        (200, EVENT, b"event: progress\ndata: {}\n\n"),
        (200, EVENT, b"event: result\ndata: not JSON\n\n"),
        (200, EVENT, b"event: error\ndata: {}\n\n"),
    ],
)
def test_what_is_not_the_service_is_told_with_its_answer_and_not_asked_again(
    asked: str, status: int, content_type: str, body: bytes
) -> None:
    with (
        server_that_says(status, content_type, body) as url,
        pytest.raises(NotTheService) as caught,
    ):
        ASKED[asked](url)

    told = str(caught.value)
    assert told.startswith(f"{url}/")
    assert f" answered {status} " in told
    assert f"({content_type or 'no content type'})" in told
    assert "\n" not in told
    assert caught.value.retry_after is None


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_proxy_without_a_service_behind_it_is_worth_another_try(asked: str, status: int) -> None:
    with (
        server_that_says(status, "text/html; charset=utf-8", b"<html>Not now</html>") as url,
        pytest.raises(NotTheService, match=rf"answered {status} .*\(text/html\)") as caught,
    ):
        ASKED[asked](url)

    assert caught.value.retry_after is not None


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("status", [401, 403])
def test_cloud_run_without_a_token_is_told_with_how_to_give_one(asked: str, status: int) -> None:
    with server_that_says(status, "text/html", b"<html>Forbidden</html>") as url:
        with pytest.raises(NotTheService, match=f"answered {status} .* with --token or MLSYS_TOK"):
            ASKED[asked](url)
        with pytest.raises(NotTheService, match="does not take the token") as caught:
            ASKED[asked](url, token="a-token.of-an-hour.ago")

    assert "a-token" not in str(caught.value)


@pytest.mark.parametrize("asked", ASKED)
def test_a_redirect_is_told_and_not_followed(asked: str) -> None:
    location = "https://sign-in.invalid/login?state=secret"
    with (
        server_that_says(302, "text/html", b"", Location=location) as url,
        pytest.raises(NotTheService, match="redirects to 'https://sign-in.invalid/login'") as told,
    ):
        ASKED[asked](url)

    assert "secret" not in str(told.value)
    assert told.value.retry_after is None


@pytest.mark.parametrize("asked", ASKED)
def test_an_answer_that_is_cut_is_worth_another_try(asked: str) -> None:
    begun = b"event: progress\n"
    with (
        server_that_says(200, EVENT, begun, Content_Length="1000") as url,
        pytest.raises(Unavailable, match=r"not all of it \(RemoteProtocolError\). Call again"),
    ):
        ASKED[asked](url)


def test_a_run_without_an_id_whose_answer_was_lost_is_written_once(
    service: Client, cloud: Cloud
) -> None:
    rows = pa.table({"id": range(100), "x": [float(i) for i in range(100)]})
    frame = rows.select(["x"]).to_pandas()
    model = cloud.publish(LinearRegression().fit(frame, frame["x"]))
    request = wanted(cloud.put(rows), cloud.new_table(), model)

    with (
        hanging_up(service.base_url, before=b"event: result") as url,
        pytest.raises(Unavailable) as caught,
    ):
        predict(url, request)
    [note] = caught.value.__notes__
    run_id = re.fullmatch(
        "Ask again with the run id ([0-9a-f]{32}): that never writes twice.", note
    )
    again = predict(str(service.base_url), request.model_copy(update={"run_id": run_id[1]}))

    assert again.rows == 100
    assert cloud.count(request.output_table) == 100


@pytest.mark.parametrize("asked", ASKED)
def test_https_where_there_is_none_is_not_worth_another_try(asked: str) -> None:
    with (
        server_that_says(200, "text/html", b"") as url,
        pytest.raises(InvalidRequest, match="No TLS with https://127"),
    ):
        ASKED[asked](url.replace("http:", "https:"))


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("token", ["hush-ü", "hush hush", "hush\n", " hush", "hush\r\nX: y"])
def test_a_token_that_can_not_be_one_is_refused_and_not_told(asked: str, token: str) -> None:
    with pytest.raises(InvalidRequest, match="The token can't be one") as caught:
        ASKED[asked]("http://127.0.0.1:1", token=token)

    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [{"ALL_PROXY": "socks5://127.0.0.1:1"}, {"ALL_PROXY": "ftp://a"}, {"SSL_CERT_FILE": "/none"}],
)
def test_settings_for_http_that_can_not_be_used_are_told(
    setting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(InvalidRequest, match="See HTTP_PROXY"):
        predict("https://service.invalid", ANYTHING)


@pytest.mark.parametrize("run_id", ["nightly?x=1", "nightly#2", "a/b", "a b", "é"])
def test_a_malformed_run_id_is_refused_and_is_no_other_run(service: Client, run_id: str) -> None:
    with pytest.raises(Refused) as caught:
        client.run(str(service.base_url), run_id, Environment.DEV)

    assert caught.value.problem.status in (400, 404)
    assert "no run 'nightly'" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:18765", "localhost:8080", "", "ftp://host", "http://", "http://host:port"]
)
def test_what_is_no_url_of_a_service_is_told_with_how_to_write_one(url: str) -> None:
    with pytest.raises(InvalidRequest, match="Write it with its scheme, as http://host:port"):
        predict(url, wanted("my-project.a.b", "my-project.a.c", "m"))
    with pytest.raises(InvalidRequest, match="is not the URL of a service"):
        register(url, Environment.DEV)


def test_an_answer_that_ends_without_a_result_is_no_success() -> None:
    with (
        server_that_says(200, "text/event-stream", b": ping\n\n") as url,
        pytest.raises(Unavailable, match="without a result"),
    ):
        predict(url, wanted("my-project.a.b", "my-project.a.c", "m"))
