"""Objects: what is stored comes back as it was, and nothing else is taken for it."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import joblib
import numpy as np
import pytest
from blockbuster import BlockBuster
from gcloud.aio.storage import Storage
from sklearn.linear_model import LinearRegression

from mlsys.clients import Clients, open_clients
from mlsys.errors import AccessDenied, Changed, Conflict, InvalidRequest, NotFound, Unavailable
from mlsys.gcs import (
    Blob,
    crc32c,
    find_blob,
    gcs_get,
    gcs_get_pickle,
    gcs_list_blobs,
    gcs_put,
    gcs_put_pickle,
    list_blobs,
    read_blob,
    write_blob,
)
from mlsys.local import free_ports
from mlsys.settings import Settings
from tests.conftest import Cloud
from tests.mlsys.rest_server import Answer, Request, RestServer, google_error

BUCKET = "mlsys-models-dev"
# The kind of upload changes at 5 MB.
SIZES = [0, 1, 100_000, 5_000_001]


@pytest.fixture
def objects(clients: Clients, cloud: Cloud) -> Storage:
    return clients.objects


def storage_at(url: str) -> Settings:
    return Settings(
        _env_file=None,
        gcp_project_id="my-project",
        bigquery_emulator_host="http://127.0.0.1:9",
        bigquery_storage_emulator_host="127.0.0.1:9",
        storage_emulator_host=url,
        retry_seconds=0.01,
    )


# Objects, on a loop


@pytest.mark.anyio
@pytest.mark.parametrize("size", SIZES)
async def test_bytes_come_back_as_they_were_stored(
    objects: Storage, cloud: Cloud, size: int
) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    written = await write_blob(objects, BUCKET, cloud.name(), data)
    found = await find_blob(objects, BUCKET, written.path)

    assert found is not None
    assert (found.bucket, found.path, found.size) == (BUCKET, written.path, size)
    assert found.crc32c == crc32c(data)
    assert found.generation == written.generation
    assert await read_blob(objects, found) == data


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path", ["a/b/c.txt", "with space", "per%cent", "ä/ü?x=1&y#z", "a+b", "v1/model.pkl", "🚢"]
)
async def test_any_path_is_taken_as_it_is(objects: Storage, cloud: Cloud, path: str) -> None:
    path = f"{cloud.name()}/{path}"
    await write_blob(objects, BUCKET, path, b"here")
    found = await find_blob(objects, BUCKET, path)

    assert found is not None
    assert await read_blob(objects, found) == b"here"
    assert [blob.path async for blob in list_blobs(objects, BUCKET, path)] == [path]


@pytest.mark.anyio
@pytest.mark.parametrize("bucket", [BUCKET, "no-such-bucket"])
async def test_an_object_that_is_not_there_is_not_found(objects: Storage, bucket: str) -> None:
    assert await find_blob(objects, bucket, "nothing/here") is None


@pytest.mark.anyio
async def test_each_store_is_a_new_generation(objects: Storage, cloud: Cloud) -> None:
    path = cloud.name()
    first = await write_blob(objects, BUCKET, path, b"one")
    second = await write_blob(objects, BUCKET, path, b"two")

    assert second.generation > first.generation
    found = await find_blob(objects, BUCKET, path)
    assert found is not None
    assert found.generation == second.generation


@pytest.mark.anyio
async def test_an_object_that_was_replaced_meanwhile_is_not_taken_for_the_one_looked_up(
    objects: Storage, cloud: Cloud
) -> None:
    first = await write_blob(objects, BUCKET, cloud.name(), b"one")
    await write_blob(objects, BUCKET, first.path, b"two")

    with pytest.raises(Changed, match="changed while it was read") as raised:
        await read_blob(objects, first)
    assert isinstance(raised.value, Unavailable)


@pytest.mark.anyio
async def test_an_object_that_is_decoded_on_its_way_is_refused_in_plain_words(
    objects: Storage, cloud: Cloud
) -> None:
    path, said = cloud.name(), {"contentEncoding": "gzip"}
    await objects.upload(
        BUCKET, path, gzip.compress(b"text"), content_type="text/plain", metadata=said
    )
    blob = await find_blob(objects, BUCKET, path)

    with pytest.raises(InvalidRequest, match="Content-Encoding gzip"):
        await read_blob(objects, blob)


@pytest.mark.anyio
async def test_damaged_bytes_are_noticed(objects: Storage, cloud: Cloud) -> None:
    blob = await write_blob(objects, BUCKET, cloud.name(), b"whole")

    with pytest.raises(Changed):
        await read_blob(objects, replace(blob, crc32c=crc32c(b"other")))


@pytest.mark.anyio
async def test_an_object_that_is_gone_is_named(objects: Storage, cloud: Cloud) -> None:
    blob = await write_blob(objects, BUCKET, cloud.name(), b"here")
    await objects.delete(BUCKET, blob.path)

    with pytest.raises(NotFound, match=f"gs://{BUCKET}/{blob.path}"):
        await read_blob(objects, blob)


@pytest.mark.anyio
async def test_an_object_that_may_only_be_new_is_not_replaced(
    objects: Storage, cloud: Cloud
) -> None:
    path = cloud.name()
    blob = await write_blob(objects, BUCKET, path, b"first", if_generation=0)
    with pytest.raises(Conflict, match=path):
        await write_blob(objects, BUCKET, path, b"second", if_generation=0)

    assert await read_blob(objects, blob) == b"first"


@pytest.mark.anyio
async def test_a_bucket_that_is_not_there_is_named(objects: Storage) -> None:
    with pytest.raises(NotFound, match="gs://no-such-bucket"):
        await write_blob(objects, "no-such-bucket", "path", b"")
    with pytest.raises(NotFound, match="gs://no-such-bucket"):
        [blob async for blob in list_blobs(objects, "no-such-bucket")]


@pytest.mark.anyio
async def test_objects_are_listed_by_their_beginning_and_in_order(
    objects: Storage, cloud: Cloud
) -> None:
    place = cloud.name()
    for name in ("b/2", "a", "b/1", "b/10", "c"):
        await write_blob(objects, BUCKET, f"{place}/{name}", name.encode())
    blobs = [blob async for blob in list_blobs(objects, BUCKET, f"{place}/b/")]

    assert [blob.path.removeprefix(f"{place}/") for blob in blobs] == ["b/1", "b/10", "b/2"]
    assert [await read_blob(objects, blob) for blob in blobs] == [b"b/1", b"b/10", b"b/2"]


def resource(path: str, **more: Any) -> dict[str, Any]:
    """An object as Cloud Storage describes it."""
    return {"bucket": "b", "name": path, "generation": "7", "size": "3", "crc32c": "AAAA"} | more


@pytest.mark.anyio
async def test_a_long_list_is_read_page_by_page(rest: RestServer) -> None:
    pages = {"": (["a", "b"], "2"), "2": ([], "3"), "3": (["c"], None)}

    def answer(request: Request) -> Answer:
        query = dict(part.split("=") for part in request.query.split("&"))
        assert query["prefix"] == "x"
        items, following = pages[query.get("pageToken", "")]
        page = {"items": [resource(item) for item in items]} if items else {}
        return 200, page | ({"nextPageToken": following} if following else {})

    rest.answer = answer
    async with open_clients(storage_at(rest.url)) as clients:
        paths = [blob.path async for blob in list_blobs(clients.objects, "b", "x")]

    assert paths == ["a", "b", "c"]
    assert len(rest.requests) == 3


@pytest.mark.anyio
async def test_a_list_that_is_not_read_to_its_end_asks_for_no_more(rest: RestServer) -> None:
    rest.answer = lambda _: (200, {"items": [resource("a")], "nextPageToken": "more"})
    async with open_clients(storage_at(rest.url)) as clients:
        async for blob in list_blobs(clients.objects, "b"):
            assert blob.path == "a"
            break

    assert len(rest.requests) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(("status", "ours"), [(403, AccessDenied), (503, Unavailable)])
async def test_what_cloud_storage_refuses_is_told_of_the_object(
    rest: RestServer, status: int, ours: type[Exception]
) -> None:
    rest.answer = lambda _: google_error(status)
    async with open_clients(storage_at(rest.url)) as clients:
        for call in (
            lambda: find_blob(clients.objects, "b", "path"),
            lambda: read_blob(clients.objects, Blob("b", "path", 1, 1, "")),
            lambda: write_blob(clients.objects, "b", "path", b""),
        ):
            with pytest.raises(ours, match="gs://b/path"):
                await call()


def test_a_description_is_read_with_what_it_has() -> None:
    plain = Blob.of(resource("p"))
    full = Blob.of(
        resource(
            "p",
            updated="2026-03-01T12:00:00.123Z",
            timeCreated="2026-02-01T12:00:00Z",
            metadata={"uploader": "ada"},
            owner={"entity": "user-grace"},
        )
    )

    assert (plain.updated, plain.created, plain.uploader) == (None, None, None)
    assert full.updated == datetime(2026, 3, 1, 12, 0, 0, 123_000, UTC)
    assert full.created == datetime(2026, 2, 1, 12, tzinfo=UTC)
    assert full.uploader == "ada"
    assert Blob.of(resource("p", owner={"entity": "user-grace"})).uploader == "user-grace"


def test_the_checksum_is_the_one_that_cloud_storage_keeps() -> None:
    # https://cloud.google.com/storage/docs/hashes-etags: big-endian, in base64.
    assert crc32c(b"") == "AAAAAA=="
    assert crc32c(b"123456789") == "4waSgw=="


# Objects, for scripts and notebooks


@pytest.mark.parametrize(
    "data", [b"", b"\x00\xff", "", "plain", "ä🚢\n", bytearray(b"ab"), memoryview(b"cd")]
)
def test_bytes_and_text_come_back_as_bytes(settings: Settings, cloud: Cloud, data: Any) -> None:
    path = cloud.name()
    gcs_put(data, BUCKET, path, settings=settings)
    expected = data.encode() if isinstance(data, str) else bytes(data)

    assert gcs_get(BUCKET, path, settings=settings) == expected


def test_what_is_neither_bytes_nor_text_is_refused(settings: Settings) -> None:
    with pytest.raises(InvalidRequest, match="A dict is neither bytes nor text"):
        gcs_put({"a": 1}, BUCKET, "path", settings=settings)


@pytest.mark.parametrize("bucket", [BUCKET, "no-such-bucket"])
def test_a_missing_object_is_named(settings: Settings, cloud: Cloud, bucket: str) -> None:
    with pytest.raises(NotFound, match=f"gs://{bucket}/nothing/here does not exist"):
        gcs_get(bucket, "nothing/here", settings=settings)


def test_a_model_comes_back_from_its_pickle(settings: Settings, cloud: Cloud) -> None:
    X = np.arange(10.0).reshape(-1, 1)
    model = LinearRegression().fit(X, 3 * X[:, 0] + 1)
    path = f"{cloud.name()}/v1/model.pkl"
    gcs_put_pickle(model, BUCKET, path, settings=settings)

    again = gcs_get_pickle(BUCKET, path, settings=settings)
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


@pytest.mark.parametrize("compress", [0, 3])
def test_what_joblib_has_dumped_can_be_loaded_too(
    settings: Settings, cloud: Cloud, compress: int
) -> None:
    file = io.BytesIO()
    joblib.dump({"weights": np.ones(1000)}, file, compress=compress)
    path = cloud.name()
    gcs_put(file.getvalue(), BUCKET, path, settings=settings)

    again = gcs_get_pickle(BUCKET, path, settings=settings)
    np.testing.assert_array_equal(again["weights"], np.ones(1000))


def test_paths_are_listed_in_order(settings: Settings, cloud: Cloud) -> None:
    place = cloud.name()
    for name in ("v2/model.pkl", "v1/model.pkl", "v1/metadata.json"):
        gcs_put(json.dumps(name), BUCKET, f"{place}/{name}", settings=settings)

    assert gcs_list_blobs(BUCKET, place, settings=settings) == [
        f"{place}/v1/metadata.json",
        f"{place}/v1/model.pkl",
        f"{place}/v2/model.pkl",
    ]
    assert gcs_list_blobs(BUCKET, f"{place}/v3", settings=settings) == []
    assert f"{place}/v1/model.pkl" in gcs_list_blobs(BUCKET, settings=settings)


def test_a_missing_bucket_is_named(settings: Settings) -> None:
    with pytest.raises(NotFound, match="gs://no-such-bucket"):
        gcs_list_blobs("no-such-bucket", settings=settings)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    [port] = free_ports(1)
    with pytest.raises(Unavailable, match="gs://b/path"):
        gcs_get("b", "path", settings=storage_at(f"http://127.0.0.1:{port}"))


def test_without_settings_the_environments_are_used(
    settings: Settings, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "gcp_project_id",
        "bigquery_emulator_host",
        "bigquery_storage_emulator_host",
        "storage_emulator_host",
    ):
        monkeypatch.setenv(name.upper(), getattr(settings, name))
    path = cloud.name()
    gcs_put("text", BUCKET, path)

    assert gcs_get(BUCKET, path) == b"text"


@pytest.mark.anyio
async def test_they_work_where_a_loop_runs_already(
    settings: Settings, cloud: Cloud, no_blocking_calls: BlockBuster
) -> None:
    """As in a notebook, whose loop they do block."""
    path = cloud.name()
    no_blocking_calls.deactivate()
    try:
        gcs_put("text", BUCKET, path, settings=settings)
        assert gcs_get(BUCKET, path, settings=settings) == b"text"
    finally:
        no_blocking_calls.activate()
