"""`GET /model-registry`: a bucket on one side, a table on the other, real servers behind both."""

from __future__ import annotations

import http.client
import http.server
import json
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import anyio
import httpx2
import pytest
from google.cloud import bigquery
from google.cloud.bigquery import SchemaField

from mlsys.gcs import crc32c, list_blobs
from mlsys.local import make_places
from mlsys.names import Environment
from mlsys.settings import Settings
from service.registry import _READERS, COLUMNS, FoundModel, Verify, scan
from tests.conftest import Client, Cloud, running_service

PATIENCE = 30
GOLDEN = {"golden": {"rows": [{"x": 1.0}], "predictions": [1.0]}}
SPECIFIED = {
    "model_name": "STRING",
    "model_version": "INT64",
    "environment": "STRING",
    "gcs_bucket": "STRING",
    "file_size_bytes": "INT64",
    "upload_timestamp": "TIMESTAMP",
    "uploader": "STRING",
    "registered_at": "TIMESTAMP",
    "metadata": "STRING",
}


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    body: bytes

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def lists_objects(self) -> bool:
        return self.path.endswith("/o")

    @property
    def reads_metadata(self) -> bool:
        return self.query.get("alt") == "media" and self.path.endswith("/metadata.json")

    @property
    def reads_model(self) -> bool:
        return self.query.get("alt") == "media" and self.path.endswith("/model.pkl")

    @property
    def merges(self) -> bool:
        return self.method == "POST" and b"MERGE" in self.body and b"@rows" in self.body


class Wire:
    """A server in front of another: remembers requests, may hold them back or answer itself."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target).netloc
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.requests: list[Request] = []
        # Called before a request is passed on; what it returns is the answer instead.
        self.before: Callable[[Request], tuple[int, bytes] | None] = lambda _: None
        # Called with each answer's body.
        self.after: Callable[[Request, bytes], bytes] = lambda _, body: body

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        request = Request(handler.command, handler.path, handler.rfile.read(length))
        self.requests.append(request)
        status, headers, body = self._answer(request, dict(handler.headers))
        handler.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _answer(
        self, request: Request, headers: dict[str, str]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        if (own := self.before(request)) is not None:
            return own[0], [("Content-Type", "application/json")], own[1]
        with closing(http.client.HTTPConnection(self._target)) as connection:
            connection.request(request.method, request.target, request.body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), self.after(request, answer.read())


@contextmanager
def wire_to(target: str) -> Iterator[Wire]:
    wire = Wire(target)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wire.handle(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        wire.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield wire
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Place:
    """A project, a bucket and a service, with a wire to each server that the service calls."""

    cloud: Cloud
    settings: Settings
    service: Client
    objects: Wire
    bigquery: Wire

    @property
    def bucket(self) -> str:
        return self.settings.gcs_bucket_models_dev

    @property
    def table(self) -> str:
        return f"{self.settings.gcp_project_id}.mlsys_dev.model_registry"

    def put(self, path: str, data: bytes | str | object = b"model", **custom: str) -> None:
        """Stores an object: bytes and text as they are, anything else as JSON."""
        self.put_all({path: data}, **custom)

    def put_all(self, objects: Mapping[str, Any], **custom: str) -> None:
        async def one(path: str) -> None:
            data = objects[path]
            await self.cloud.clients.objects.upload(
                self.bucket,
                path,
                data if isinstance(data, bytes | str) else json.dumps(data),
                content_type="application/octet-stream",
                metadata={"metadata": custom},
                force_resumable_upload=False,
            )

        self.cloud.portal.call(many, one, objects)

    def delete(self, path: str) -> None:
        self.cloud.portal.call(self.cloud.clients.objects.delete, self.bucket, path)

    def described(self, path: str) -> dict[str, Any]:
        """What Cloud Storage says of an object."""
        call = self.cloud.clients.objects.download_metadata
        return self.cloud.portal.call(call, self.bucket, path)

    def get(self) -> httpx2.Response:
        return self.service.get("/model-registry", params={"env": "dev"})

    def scan(self) -> dict[str, Any]:
        response = self.get()
        assert response.status_code == 200, response.text
        return response.json()

    def scan_in_process(self, verify: Verify | None = None) -> None:
        cloud = self.cloud
        cloud.portal.call(scan, cloud.clients, self.settings, Environment.DEV, verify)

    def rows(self) -> list[dict[str, Any]]:
        return self.cloud.rows(self.table, order_by="environment, model_name, model_version")

    def duplicate(self, name: str) -> None:
        """Stores the row of a model in dev a second time."""
        self.cloud.query(
            f"INSERT INTO `{self.table}` SELECT * FROM `{self.table}` "
            f"WHERE environment = 'dev' AND model_name = '{name}'"
        )

    def by_name(self) -> dict[str, dict[str, Any]]:
        """The rows by model, where each has one version."""
        rows = self.rows()
        assert len({row["model_name"] for row in rows}) == len(rows)
        return {row["model_name"]: row for row in rows}

    def reset(self) -> None:
        """Empties the bucket, drops the table, and lets everything through again."""
        self.objects.reset()
        self.bigquery.reset()
        self.cloud.clients.bigquery.delete_table(self.table, not_found_ok=True)

        async def empty() -> None:
            paths = [b.path async for b in list_blobs(self.cloud.clients.objects, self.bucket)]
            await many(partial(self.cloud.clients.objects.delete, self.bucket), paths)

        self.cloud.portal.call(empty)


async def many[T](call: Callable[[T], Awaitable[object]], items: Iterable[T]) -> None:
    limiter = anyio.CapacityLimiter(16)

    async def one(item: T) -> None:
        async with limiter:
            await call(item)

    async with anyio.create_task_group() as tasks:
        for item in items:
            tasks.start_soon(one, item)


@pytest.fixture(scope="module")
def shared_place(cloud: Cloud, settings: Settings) -> Iterator[Place]:
    unique = uuid.uuid4().hex[:12]
    own = settings.model_copy(
        update={
            "gcp_project_id": f"project-{unique}",
            "gcs_bucket_models_dev": f"models-{unique}",
        }
    )
    cloud.portal.call(make_places, cloud.clients, own)
    cloud.clients.bigquery.create_dataset(f"{own.gcp_project_id}.mlsys_dev")
    with (
        wire_to(own.storage_emulator_host) as objects,
        wire_to(own.bigquery_emulator_host) as rest,
    ):
        wired = {"storage_emulator_host": objects.url, "bigquery_emulator_host": rest.url}
        with running_service(own.model_copy(update=wired)) as service:
            yield Place(cloud, own, service, objects, rest)


@pytest.fixture
def place(shared_place: Place) -> Place:
    shared_place.reset()
    return shared_place


@pytest.fixture
def start(place: Place, start_service: Callable[..., Client]) -> Callable[..., Client]:
    """Starts a service for the same place, without wires and with other settings."""
    own = ("gcp_project_id", "gcs_bucket_models_dev")
    return partial(start_service, **place.settings.model_dump(include=set(own)))


def named(answer: dict[str, Any], kind: str = "registered") -> list[str]:
    return [f"{each['name']}/{each['version']}" for each in answer[kind]]


def reasons(answer: dict[str, Any]) -> dict[str, str]:
    return {each["path"]: each["reason"] for each in answer["skipped"]}


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


def assert_problem(response: httpx2.Response, status: int, *told: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    for words in told:
        assert words in body["detail"]
    return body


# What is registered


def test_the_schema_begins_with_the_specified_columns_in_order() -> None:
    assert {c.name: c.field_type for c in COLUMNS[: len(SPECIFIED)]} == SPECIFIED
    assert [c.name for c in COLUMNS[: len(SPECIFIED)]] == list(SPECIFIED)
    assert {c.mode for c in COLUMNS} == {"NULLABLE"}
    assert all(c.description for c in COLUMNS)


def test_the_table_is_made_with_that_schema(place: Place) -> None:
    answer = place.scan()

    assert answer["table"] == place.table
    made = place.cloud.clients.bigquery.get_table(place.table).schema
    assert [(c.name, c.description) for c in made] == [(c.name, c.description) for c in COLUMNS]
    assert place.rows() == []


def test_a_model_is_registered_with_all_that_the_bucket_and_its_metadata_tell(
    place: Place,
) -> None:
    metadata = {
        "features": ["Age", {"name": "Fare", "type": "FLOAT64"}],
        "target": "Survived",
        "sha256": "ab" * 32,
        "sklearn_version": "1.9.0",
        "python_version": "3.12.3",
        "note": 'Grüße, "quoted" \\ 🚢',
    }
    place.put("titanic-survival/v12/model.pkl", b"twelve bytes", uploader="jane@example.com")
    place.put("titanic-survival/v12/metadata.json", json.dumps(metadata, indent=2))
    begun = datetime.now(UTC)

    answer = place.scan()

    ended = datetime.now(UTC)
    stored = place.described("titanic-survival/v12/model.pkl")
    [row] = place.rows()
    assert begun <= row.pop("registered_at") <= ended
    assert json.loads(row.pop("metadata")) == metadata
    assert row == {
        "model_name": "titanic-survival",
        "model_version": 12,
        "environment": "dev",
        "gcs_bucket": place.bucket,
        "file_size_bytes": 12,
        "upload_timestamp": datetime.fromisoformat(stored["timeCreated"]),
        "uploader": "jane@example.com",
        "generation": int(stored["generation"]),
        "crc32c": crc32c(b"twelve bytes"),
        "sha256": "ab" * 32,
        "sklearn_version": "1.9.0",
        "python_version": "3.12.3",
        "deleted_at": None,
        "verified": None,
        "verification": None,
    }
    assert answer == {
        "env": "dev",
        "bucket": place.bucket,
        "table": place.table,
        "registered": [
            {
                "name": "titanic-survival",
                "version": "v12",
                "generation": int(stored["generation"]),
                "problem": None,
            }
        ],
        "deleted": [],
        "skipped": [],
        "counts": {"objects": 2, "registered": 1, "deleted": 0, "skipped": 0},
        "seconds": answer["seconds"],
    }
    assert 0 < answer["seconds"] <= (ended - begun).total_seconds()


def test_a_model_without_metadata_is_registered_all_the_same(place: Place) -> None:
    place.put("churn/v1/model.pkl")

    answer = place.scan()

    assert named(answer) == ["churn/v1"]
    assert answer["skipped"] == []
    [row] = place.rows()
    told = ("metadata", "uploader", "sha256", "sklearn_version", "python_version")
    assert [row[name] for name in told] == [None] * 5


def test_models_are_listed_by_name_and_number(place: Place) -> None:
    place.put_all({f"{each}/model.pkl": b"m" for each in ("b/v10", "b/v9", "a/v2", "b/v100")})

    assert named(place.scan()) == ["a/v2", "b/v9", "b/v10", "b/v100"]


# Two thousand objects


def test_two_thousand_objects_are_listed_page_by_page_and_registered_by_one_merge(
    place: Place,
) -> None:
    models = {f"model-{n % 50}/v{n // 50 + 1}" for n in range(950)}
    features = [{"name": f"feature_{n}", "type": "FLOAT64"} for n in range(20)]
    metadata = {each: {"target": each, "features": features} for each in models}
    place.put_all({f"{each}/model.pkl": b"m" for each in models})
    place.put_all({f"{each}/metadata.json": metadata[each] for each in models})
    place.put_all({f"notes/{n}.txt": b"n" for n in range(150)})

    answer = place.scan()

    assert answer["counts"] == {"objects": 2050, "registered": 950, "deleted": 0, "skipped": 150}
    assert reasons(answer).keys() == {f"notes/{n}.txt" for n in range(150)}
    assert set(named(answer)) == models
    rows = {f"{row['model_name']}/v{row['model_version']}": row for row in place.rows()}
    assert {each: json.loads(row["metadata"]) for each, row in rows.items()} == metadata
    pages = [r.query for r in place.objects.requests if r.lists_objects]
    assert [page["maxResults"] for page in pages] == ["1000"] * 3
    assert "pageToken" not in pages[0]
    assert len({page["pageToken"] for page in pages[1:]}) == 2
    assert len([r for r in place.bigquery.requests if r.merges]) == 1


def test_metadata_is_read_many_at_once_and_never_more_than_that(place: Place) -> None:
    count = 3 * _READERS
    place.put_all({f"m{n}/v1/model.pkl": b"m" for n in range(count)})
    place.put_all({f"m{n}/v1/metadata.json": {"n": n} for n in range(count)})
    full, lock = threading.Event(), threading.Lock()
    now, most = 0, 0

    def enter(request: Request) -> None:
        nonlocal now, most
        if request.reads_metadata:
            with lock:
                now += 1
                most = max(most, now)
                is_full = now == _READERS and not full.is_set()
            if is_full:
                # While the service answers these, it would send a read too many.
                for _ in range(20):
                    place.service.get("/health")
                full.set()
            assert full.wait(PATIENCE), "the reads follow one another"

    def leave(request: Request, body: bytes) -> bytes:
        nonlocal now
        if request.reads_metadata:
            with lock:
                now -= 1
        return body

    place.objects.before, place.objects.after = enter, leave

    answer = place.scan()

    assert answer["counts"]["registered"] == count
    assert most == _READERS
    assert len([r for r in place.objects.requests if r.reads_metadata]) == count


def test_metadata_is_read_only_where_it_stands_beside_a_model(place: Place) -> None:
    place.put_all(
        {
            "a/v1/model.pkl": b"m",
            "a/v1/metadata.json": {},
            "b/v1/model.pkl": b"m",
            "c/v1/metadata.json": {},
            "metadata.json": {},
        }
    )

    place.get()

    downloads = [r.path for r in place.objects.requests if r.reads_metadata]
    assert [path.partition("/o/")[2] for path in downloads] == ["a/v1/metadata.json"]


# What is skipped

BROKEN = {
    "cut-off": (b'{"target": "x"', "EOF while parsing an object"),
    "empty": (b"", "EOF while parsing a value"),
    "list": (b"[1, 2]", "Input should be an object"),
    "null": (b"null", "Input should be an object"),
    "text": (b'"hello"', "Input should be an object"),
    "nan": (b'{"metrics": {"auc": NaN}}', "Invalid JSON"),
    "infinite": (b'{"metrics": {"auc": 1e999}}', "not JSON compliant"),
    "latin": ('{"target": "Größe"}'.encode("latin-1"), "Invalid JSON"),
    "surrogate": (b'{"target": "\\ud800"}', "Invalid JSON"),
    "deep": (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "recursion limit exceeded"),
    "number": (b'{"a": ' + b"9" * 9000 + b"}", "number out of range"),
    "features": (b'{"features": 3}', "'features': Input should be a valid array"),
    "pickle": (b"\x80\x04\x95\x00", "Invalid JSON"),
    "large": (b'{"a": "' + b"x" * 1024 * 1024 + b'"}', "1,048,585 bytes"),
}


def test_broken_metadata_is_skipped_by_name_and_its_model_registered_without(place: Place) -> None:
    place.put_all({f"{name}/v1/model.pkl": b"m" for name in [*BROKEN, "sound"]})
    place.put_all({f"{name}/v1/metadata.json": data for name, (data, _) in BROKEN.items()})
    place.put("sound/v1/metadata.json", {"target": "x"})

    answer = place.scan()

    told = reasons(answer)
    assert told.keys() == {f"{name}/v1/metadata.json" for name in BROKEN}
    for name, (_, why) in BROKEN.items():
        reason = told[f"{name}/v1/metadata.json"]
        assert why in reason
        assert "registered without it" in reason
        assert reason.isprintable()
        assert len(reason) < 300
    rows = place.by_name()
    assert {name: row["metadata"] for name, row in rows.items()} == {
        **dict.fromkeys(BROKEN),
        "sound": '{"target":"x"}',
    }


def test_metadata_that_was_mended_is_taken_by_the_next_scan_and_lost_when_it_breaks(
    place: Place,
) -> None:
    place.put("m/v1/model.pkl")
    seen = []
    for content in ("{", {"sklearn_version": "1.9.0"}, "{"):
        place.put("m/v1/metadata.json", content)
        skipped = place.scan()["counts"]["skipped"]
        [row] = place.rows()
        seen.append((skipped, row["metadata"], row["sklearn_version"]))

    broken = (1, None, None)
    assert seen == [broken, (0, '{"sklearn_version":"1.9.0"}', "1.9.0"), broken]


def test_text_that_no_column_should_hold_is_left_out_and_fails_nobody(place: Place) -> None:
    hostile = {"sha256": "\x00", "sklearn_version": "x" * 5000, "python_version": "3.12\n"}
    place.put("m/v1/model.pkl", uploader="jane\x00")
    place.put("m/v1/metadata.json", hostile)
    place.put("other/v1/model.pkl")

    answer = place.scan()

    assert named(answer) == ["m/v1", "other/v1"]
    row = place.by_name()["m"]
    told = ("uploader", "sha256", "sklearn_version", "python_version")
    assert [row[name] for name in told] == [None] * 4
    assert json.loads(row["metadata"]) == hostile


def test_stray_files_and_odd_paths_are_skipped_by_name_with_the_reason(place: Place) -> None:
    neither = "It is neither {name}/v{N}/model.pkl nor the metadata.json beside one."
    no_version = " is not a model version. Use v1, v2, … or latest."
    odd = {
        "README.md": neither,
        "model.pkl": neither,
        "metadata.json": neither,
        "good/model.pkl": neither,
        "good/v1/": neither,
        "good/v1/MODEL.pkl": neither,
        "good/v1/model.pkl.bak": neither,
        "good/v1/report.html": neither,
        "good/v1/deep/model.pkl": neither,
        "good/v1/deep/metadata.json": neither,
        "good/v1//model.pkl": neither,
        "/good/v1/model.pkl": neither,
        "good/latest/model.pkl": neither,
        "../x/v1/model.pkl": neither,
        "../v1/model.pkl": "'..' is not a model name.",
        "/v1/model.pkl": "'' is not a model name.",
        "Good/v1/model.pkl": "'Good' is not a model name.",
        "grün/v1/model.pkl": "'gr\\xfcn' is not a model name.",
        "g\u200bood/v1/model.pkl": "'g\\u200bood' is not a model name.",
        "a\nb/v1/model.pkl": "'a\\nb' is not a model name.",
        "good\n/v1/model.pkl": "'good\\n' is not a model name.",
        "a'); DROP TABLE x; --/v1/model.pkl": " is not a model name.",
        f"{'n' * 64}/v1/model.pkl": " is not a model name.",
        "good/v01/model.pkl": "'v01'" + no_version,
        "good/v0/model.pkl": "'v0'" + no_version,
        "good/1/model.pkl": "'1'" + no_version,
        "good/V1/model.pkl": "'V1'" + no_version,
        "good/v1234567890/model.pkl": "'v1234567890'" + no_version,
        "good/v\u0661/model.pkl": "'v\\u0661'" + no_version,
        "good/v7/metadata.json": "There is no model.pkl beside it.",
    }
    place.put_all(dict.fromkeys(odd, b"{}"))
    place.put("good/v1/model.pkl")

    answer = place.scan()

    assert named(answer) == ["good/v1"]
    assert len(place.rows()) == 1
    told = reasons(answer)
    assert told.keys() == odd.keys()
    for path, reason in odd.items():
        assert reason in told[path], path
    assert [each["path"] for each in answer["skipped"]] == sorted(odd)


def test_metadata_that_is_replaced_as_it_is_read_is_read_anew(place: Place) -> None:
    place.put("m/v1/model.pkl")
    place.put("m/v1/metadata.json", {"target": "old"})
    replaced = threading.Event()

    def replace(request: Request) -> None:
        if request.reads_metadata and not replaced.is_set():
            replaced.set()
            place.put("m/v1/metadata.json", {"target": "new"})

    place.objects.before = replace

    answer = place.scan()

    assert answer["skipped"] == []
    [row] = place.rows()
    assert row["metadata"] == '{"target":"new"}'


def test_metadata_that_never_arrives_as_stored_is_skipped_and_holds_nobody_up(place: Place) -> None:
    place.put_all({"a/v1/model.pkl": b"m", "a/v1/metadata.json": {}, "b/v1/model.pkl": b"m"})
    place.objects.after = lambda request, body: body + b" " if request.reads_metadata else body

    answer = place.scan()

    assert named(answer) == ["a/v1", "b/v1"]
    assert "Upload it without Content-Encoding." in reasons(answer)["a/v1/metadata.json"]


def test_metadata_that_is_deleted_as_it_is_read_is_skipped(place: Place) -> None:
    place.put_all({"a/v1/model.pkl": b"m", "a/v1/metadata.json": {}})

    def delete(request: Request) -> None:
        if request.reads_metadata:
            place.delete("a/v1/metadata.json")

    place.objects.before = delete

    answer = place.scan()

    assert named(answer) == ["a/v1"]
    assert "It was deleted meanwhile." in reasons(answer)["a/v1/metadata.json"]


# Scanned again


def test_scanning_twice_changes_nothing_but_registered_at(place: Place) -> None:
    place.put_all({f"m{n}/v1/model.pkl": b"m" for n in range(5)}, uploader="jane")
    place.put_all({f"m{n}/v1/metadata.json": {"target": "t", "sha256": "x"} for n in range(3)})
    place.put("m3/v1/metadata.json", "broken")
    place.scan()
    place.delete("m4/v1/model.pkl")
    first_answer, first = place.scan(), place.rows()

    second_answer, second = place.scan(), place.rows()

    assert without(second, "registered_at") == without(first, "registered_at")
    for before, after in zip(first, second, strict=True):
        gone = before["model_name"] == "m4"
        assert (after["registered_at"] > before["registered_at"]) is not gone
    for each in ("registered", "skipped"):
        assert second_answer[each] == first_answer[each]


def test_a_deleted_model_is_marked_and_kept_and_told_once(place: Place) -> None:
    place.put_all({"a/v1/model.pkl": b"m", "a/v2/model.pkl": b"m", "a/v2/metadata.json": {}})
    place.scan()
    before = place.rows()
    place.delete("a/v2/model.pkl")
    begun = datetime.now(UTC)

    answer = place.scan()

    ended = datetime.now(UTC)
    assert named(answer) == ["a/v1"]
    assert answer["deleted"] == [
        {
            "name": "a",
            "version": "v2",
            "generation": before[1]["generation"],
            "problem": None,
        }
    ]
    assert answer["counts"]["deleted"] == 1
    assert reasons(answer) == {"a/v2/metadata.json": "There is no model.pkl beside it."}
    kept, marked = place.rows()
    assert kept["deleted_at"] is None
    assert begun <= marked["deleted_at"] <= ended
    assert without([marked], "deleted_at") == without([before[1]], "deleted_at")
    assert place.scan()["deleted"] == []
    assert place.rows()[1] == marked


def test_a_deleted_model_that_is_uploaded_again_is_there_again(place: Place) -> None:
    place.put("a/v1/model.pkl", b"old")
    place.scan()
    [old] = place.rows()
    place.delete("a/v1/model.pkl")
    place.scan()
    place.put("a/v1/model.pkl", b"newer")

    answer = place.scan()

    [row] = place.rows()
    assert row["deleted_at"] is None
    assert row["generation"] == answer["registered"][0]["generation"] > old["generation"]
    assert (row["file_size_bytes"], row["crc32c"]) == (5, crc32c(b"newer"))
    assert row["upload_timestamp"] > old["upload_timestamp"]


def test_an_emptied_bucket_marks_every_model(place: Place) -> None:
    paths = [f"m{n}/v1/model.pkl" for n in range(3)]
    place.put_all(dict.fromkeys(paths, b"m"))
    place.scan()
    for path in paths:
        place.delete(path)

    assert named(place.scan(), "deleted") == ["m0/v1", "m1/v1", "m2/v1"]
    assert all(row["deleted_at"] for row in place.rows())


def test_rows_of_other_environments_are_left_alone(place: Place) -> None:
    place.put_all({"a/v1/model.pkl": b"m", "b/v1/model.pkl": b"m"})
    place.scan()
    place.cloud.query(
        f"INSERT INTO `{place.table}` (model_name, model_version, environment, registered_at) "
        "SELECT name, 1, 'staging', TIMESTAMP '2020-01-01' FROM UNNEST(['a', 'c', 'c']) AS name"
    )
    place.duplicate("a")
    before = place.rows()
    place.delete("b/v1/model.pkl")

    answer = place.scan()

    assert named(answer, "deleted") == ["b/v1"]
    after = place.rows()
    assert [row["environment"] for row in after] == ["dev"] * 2 + ["staging"] * 3
    assert after[2:] == before[3:]


# Several scans at once


def test_scans_at_once_leave_one_row_a_model(place: Place) -> None:
    models = [f"m{n}/v1/model.pkl" for n in range(40)]
    place.put_all(dict.fromkeys(models, b"m"))
    start = threading.Barrier(6)

    def one(_: int) -> httpx2.Response:
        start.wait(PATIENCE)
        return place.get()

    with ThreadPoolExecutor(6) as threads:
        responses = list(threads.map(one, range(6)))

    assert [response.status_code for response in responses] == [200] * 6, responses[0].text
    rows = place.rows()
    assert len(rows) == len(models)
    assert {f"{row['model_name']}/v1/model.pkl" for row in rows} == set(models)
    assert not any(row["deleted_at"] for row in rows)


def test_rows_that_two_first_scans_have_both_inserted_become_one(place: Place) -> None:
    # The local server runs one statement after the other; BigQuery lets both insert.
    columns = [*COLUMNS, SchemaField("team", "STRING")]
    place.cloud.clients.bigquery.create_table(bigquery.Table(place.table, schema=columns))
    place.put_all({"a/v1/model.pkl": b"m", "b/v1/model.pkl": b"m"})
    place.scan()
    place.cloud.query(f"UPDATE `{place.table}` SET team = 'red' WHERE TRUE")
    before = place.rows()
    place.duplicate("a")
    assert len(place.rows()) == 3

    place.scan()

    assert without(place.rows(), "registered_at") == without(before, "registered_at")


def test_an_earlier_scan_that_ends_later_does_not_undo_a_later_one(place: Place) -> None:
    place.put_all({"gone/v1/model.pkl": b"m", "new/v1/model.pkl": b"old"})
    place.put("late/v1/model.pkl")
    place.put_all({"late/v1/metadata.json": {}, "slow/v1/model.pkl": b"m"})
    place.scan()
    listed, go_on = threading.Event(), threading.Event()

    def hold_the_first(request: Request) -> None:
        if request.reads_metadata and not listed.is_set():
            listed.set()
            assert go_on.wait(PATIENCE)

    place.objects.before = hold_the_first
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(place.get)
        assert listed.wait(PATIENCE)
        place.delete("gone/v1/model.pkl")
        place.put("new/v1/model.pkl", b"newer")
        place.put("added/v1/model.pkl")
        place.scan()
        later = place.rows()
        go_on.set()
        assert slow.result(PATIENCE).status_code == 200

    assert place.rows() == later
    assert {row["model_name"] for row in later if row["deleted_at"]} == {"gone"}
    assert place.by_name()["new"]["file_size_bytes"] == 5


def test_a_merge_that_collides_with_another_is_run_again(place: Place) -> None:
    place.put("a/v1/model.pkl")
    collided = threading.Event()

    def collide(request: Request) -> tuple[int, bytes] | None:
        if not request.merges or collided.is_set():
            return None
        collided.set()
        message = f"Could not serialize access to table {place.table} due to concurrent update"
        errors = [{"reason": "invalidQuery", "message": message, "location": "q"}]
        return 400, json.dumps(
            {"error": {"code": 400, "message": message, "errors": errors}}
        ).encode()

    place.bigquery.before = collide

    response = place.get()

    assert response.status_code == 200, response.text
    assert collided.is_set()
    assert len(place.rows()) == 1


def test_more_than_one_request_can_carry_goes_in_several_and_marks_nobody(place: Place) -> None:
    note = 250_000 * '"'  # As text in JSON in JSON, four bytes each.
    names = [f"m{n}" for n in range(12)]
    place.put_all({f"{name}/v1/model.pkl": b"m" for name in [*names, "gone"]})
    place.scan()
    place.put_all({f"{name}/v1/metadata.json": {"note": note} for name in names})
    place.delete("gone/v1/model.pkl")
    place.bigquery.requests.clear()

    answer = place.scan()

    merges = [len(r.body) for r in place.bigquery.requests if r.merges]
    assert 1 < len(merges) < len(names)
    assert max(merges) < 10_000_000
    assert named(answer, "deleted") == ["gone/v1"]
    rows = place.by_name()
    assert {name for name, row in rows.items() if row["deleted_at"]} == {"gone"}
    for name in names:
        assert json.loads(rows[name]["metadata"]) == {"note": note}


def test_a_scan_that_dies_between_two_merges_marks_no_model_that_is_there(place: Place) -> None:
    place.put_all({f"m{n}/v1/model.pkl": b"m" for n in range(12)})
    place.scan()
    place.put_all({f"m{n}/v1/metadata.json": {"note": 250_000 * '"'} for n in range(12)})

    def refuse_the_second(request: Request) -> tuple[int, bytes] | None:
        if request.merges and len([r for r in place.bigquery.requests if r.merges]) > 1:
            return 403, b'{"error": {"code": 403, "message": "no more", "errors": []}}'
        return None

    place.bigquery.requests.clear()
    place.bigquery.before = refuse_the_second

    assert_problem(place.get(), 403)

    written = [row["metadata"] is not None for row in place.rows()]
    assert 0 < sum(written) < len(written) == 12
    assert not any(row["deleted_at"] for row in place.rows())


# The table that is there


def test_a_table_that_lacks_newer_columns_gets_them_and_keeps_its_rows(place: Place) -> None:
    old = [SchemaField(name, kind) for name, kind in SPECIFIED.items()]
    place.cloud.clients.bigquery.create_table(bigquery.Table(place.table, schema=old))
    place.cloud.query(
        f"INSERT INTO `{place.table}` (model_name, model_version, environment) "
        "VALUES ('a', 1, 'dev'), ('gone', 1, 'dev')"
    )
    place.put("a/v1/model.pkl", b"four")

    answer = place.scan()

    # The local server tells of such columns in a result only, not in the table's metadata.
    rows = place.by_name()
    assert set(rows["a"]) == {column.name for column in COLUMNS}
    assert rows["a"]["file_size_bytes"] == 4
    assert rows["a"]["generation"] == answer["registered"][0]["generation"]
    assert rows["gone"]["deleted_at"] is not None
    place.scan()
    assert len(place.rows()) == 2


def test_a_table_with_columns_of_other_types_is_refused_and_left_as_it_is(place: Place) -> None:
    fields = [SchemaField("model_name", "STRING"), SchemaField("model_version", "STRING")]
    place.cloud.clients.bigquery.create_table(bigquery.Table(place.table, schema=fields))
    place.put("a/v1/model.pkl")

    body = assert_problem(place.get(), 422, place.table, "model_version is STRING")

    assert body["mistyped_columns"] == ["model_version is STRING, not INT64"]
    assert place.cloud.columns(place.table) == {"model_name": "STRING", "model_version": "STRING"}


# Verdicts


def test_a_generation_is_verified_once_and_its_verdict_stays_until_the_next(place: Place) -> None:
    place.put_all({f"{each}/v1/model.pkl": b"m" for each in ("good", "bad", "without-golden-rows")})
    place.put("good/v1/metadata.json", GOLDEN)
    place.put("bad/v1/metadata.json", {"target": "t"} | GOLDEN)
    asked: list[str] = []

    async def verify(model: FoundModel) -> str | None:
        asked.append(model.name)
        return "2 of 5\x00 predictions differ" if model.metadata.target else None

    def asked_in_a_scan() -> list[str]:
        asked.clear()
        place.scan_in_process(verify)
        return sorted(asked)

    def verdicts() -> dict[str, tuple[bool | None, str | None]]:
        rows = place.by_name()
        assert rows["without-golden-rows"]["verified"] is None
        return {
            name: (rows[name]["verified"], rows[name]["verification"]) for name in ("good", "bad")
        }

    place.scan_in_process()
    assert verdicts() == {"good": (None, None), "bad": (None, None)}

    assert asked_in_a_scan() == ["bad", "good"]
    assert verdicts() == {"good": (True, None), "bad": (False, "2 of 5 predictions differ")}
    told = {each["name"]: each["problem"] for each in place.scan()["registered"]}
    assert told == {
        "good": None,
        "bad": "2 of 5 predictions differ",
        "without-golden-rows": None,
    }

    assert asked_in_a_scan() == []
    place.scan_in_process()
    assert verdicts() == {"good": (True, None), "bad": (False, "2 of 5 predictions differ")}

    place.put("bad/v1/model.pkl", b"mended")
    place.scan_in_process()
    assert verdicts() == {"good": (True, None), "bad": (None, None)}

    place.put("bad/v1/metadata.json", GOLDEN)
    assert asked_in_a_scan() == ["bad"]
    assert verdicts() == {"good": (True, None), "bad": (True, None)}

    # Other golden rows are other questions.
    place.put("good/v1/metadata.json", {"target": "t"} | GOLDEN)
    place.scan_in_process()
    assert verdicts() == {"good": (None, None), "bad": (True, None)}
    assert asked_in_a_scan() == ["good"]
    assert verdicts() == {"good": (False, "2 of 5 predictions differ"), "bad": (True, None)}
    assert asked_in_a_scan() == []
    place.put("good/v1/metadata.json", GOLDEN)
    assert asked_in_a_scan() == ["good"]
    assert verdicts() == {"good": (True, None), "bad": (True, None)}


def test_a_model_that_is_deleted_as_it_is_verified_has_no_verdict_and_fails_no_scan(
    place: Place,
) -> None:
    place.put_all({f"{each}/v1/model.pkl": b"m" for each in "ab"})
    place.put_all({f"{each}/v1/metadata.json": GOLDEN for each in "ab"})

    def delete(request: Request) -> None:
        if request.reads_model and "/a/" in request.path:
            place.delete("a/v1/model.pkl")

    place.objects.before = delete

    response = place.get()

    assert response.status_code == 200, response.text
    assert {name: row["verified"] for name, row in place.by_name().items()} == {
        "a": None,
        "b": False,
    }
    assert named(place.scan(), "deleted") == ["a/v1"]


# Refusals


def test_another_environment_than_the_deployment_s_own_is_refused(
    place: Place, start: Callable[..., Client]
) -> None:
    response = start(mlsys_env="prod").get("/model-registry", params={"env": "dev"})

    assert_problem(response, 403, "env=prod only")
    assert not place.cloud.exists(place.table)


@pytest.mark.parametrize(
    "query", ["", "env=", "env=production", "env=dev&bucket=other", "env=dev&env=prod%00"]
)
def test_malformed_parameters_are_named(place: Place, query: str) -> None:
    assert_problem(place.service.get(f"/model-registry?{query}"), 400)


def test_a_missing_bucket_is_not_found_and_no_table_is_made(
    place: Place, start: Callable[..., Client]
) -> None:
    service = start(gcs_bucket_models_dev="no-such-bucket")

    response = service.get("/model-registry", params={"env": "dev"})

    assert_problem(response, 404, "gs://no-such-bucket does not exist")
    assert not place.cloud.exists(place.table)


def test_a_missing_dataset_is_not_found_and_told_how_to_make(
    start: Callable[..., Client],
) -> None:
    service = start(gcp_project_id="project-without-data")

    response = service.get("/model-registry", params={"env": "dev"})

    dataset = "project-without-data:mlsys_dev"
    assert_problem(response, 404, f"dataset {dataset}", f"bq mk --dataset {dataset}")


@pytest.mark.parametrize("which", ["storage_emulator_host", "bigquery_emulator_host"])
def test_a_server_that_is_down_is_unavailable_and_to_be_tried_again(
    start: Callable[..., Client], which: str
) -> None:
    service = start(**{which: "http://127.0.0.1:1"}, retry_seconds=0.5)

    response = service.get("/model-registry", params={"env": "dev"})

    assert_problem(response, 503)
    assert int(response.headers["Retry-After"]) > 0


def test_cloud_storage_that_fails_halfway_fails_the_scan_and_writes_nothing(
    place: Place, start: Callable[..., Client]
) -> None:
    service = start(storage_emulator_host=place.objects.url, retry_seconds=0.5)
    place.put_all({"a/v1/model.pkl": b"m", "a/v1/metadata.json": {"target": "x"}})
    place.scan()
    before = place.rows()
    place.objects.before = lambda r: (503, b"{}") if r.reads_metadata else None

    response = service.get("/model-registry", params={"env": "dev"})

    assert_problem(response, 503, "a/v1/metadata.json")
    assert place.rows() == before


def test_a_download_that_fails_once_is_tried_again(place: Place) -> None:
    place.put_all({"a/v1/model.pkl": b"m", "a/v1/metadata.json": {"target": "x"}})
    failed = threading.Event()

    def fail(request: Request) -> tuple[int, bytes] | None:
        if request.reads_metadata and not failed.is_set():
            failed.set()
            return 503, b"{}"
        return None

    place.objects.before = fail

    assert place.scan()["skipped"] == []
    assert place.rows()[0]["metadata"] == '{"target":"x"}'
