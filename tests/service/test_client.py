"""The client against the real service, and against servers that misbehave."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pytest
from sklearn.linear_model import LinearRegression

from mlsys.errors import InvalidRequest, Unavailable
from mlsys.names import Environment
from service.client import Refused, predict, register
from service.contract import PredictRequest, ProgressEvent
from tests.conftest import Client, Cloud


def wanted(input_table: str, output_table: str, model: str) -> PredictRequest:
    return PredictRequest(
        env="dev",
        input_table=input_table,
        output_table=output_table,
        model_name=model,
        model_version="latest",
    )


@contextmanager
def server_that_says(status: int, content_type: str, body: bytes) -> Iterator[str]:
    """An HTTP server that gives one answer to everything, and then hangs up."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


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


def test_an_answer_that_is_not_ours_is_told_by_its_status() -> None:
    with (
        server_that_says(403, "text/html", b"<html>Forbidden</html>") as url,
        pytest.raises(Refused, match="HTTP 403: Forbidden"),
    ):
        predict(url, wanted("my-project.a.b", "my-project.a.c", "m"))


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
