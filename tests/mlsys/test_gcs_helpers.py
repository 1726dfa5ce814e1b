"""Objects for scripts and notebooks: stored, read and listed, or told why not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from mlsys import MlsysError, Settings, gcs_get, gcs_get_pickle, gcs_list_blobs
from mlsys import gcs_put as put
from mlsys import gcs_put_pickle as put_pickle
from mlsys.errors import AccessDenied, InvalidRequest, NotFound, Unavailable
from tests.conftest import Cloud
from tests.mlsys.rest_server import Answer, Request, google_error, rest_server

PATIENCE = 30
BUCKET = "mlsys-models-dev"

type Helper = Callable[..., Any]

READERS: list[Helper] = [gcs_get, gcs_get_pickle, gcs_list_blobs]


def put_text(bucket: str, path: str, **settings: Any) -> None:
    put("text", bucket, path, **settings)


def put_number(bucket: str, path: str, **settings: Any) -> None:
    put_pickle(1, bucket, path, **settings)


EACH = pytest.mark.parametrize("helper", [*READERS, put_text, put_number])


def test_an_object_that_is_stored_again_is_replaced(cloud: Cloud, settings: Settings) -> None:
    path = cloud.name()

    put("a long text", BUCKET, path, settings=settings)
    put(b"bytes", BUCKET, path, settings=settings)

    assert gcs_get(BUCKET, path, settings=settings) == b"bytes"
    assert gcs_list_blobs(BUCKET, path, settings=settings) == [path]


def test_a_large_object_comes_back_as_it_was(cloud: Cloud, settings: Settings) -> None:
    path, data = cloud.name(), np.random.default_rng(0).bytes(30_000_000)

    put(memoryview(data), BUCKET, path, settings=settings)

    assert gcs_get(BUCKET, path, settings=settings) == data


def test_any_python_object_comes_back_from_its_pickle(cloud: Cloud, settings: Settings) -> None:
    path, data = cloud.name(), {"a": [1, None, "Ø"], "b": np.arange(3), "c": {1.5}}

    put_pickle(data, BUCKET, path, settings=settings)

    back = gcs_get_pickle(BUCKET, path, settings=settings)
    assert back.pop("b").tolist() == data.pop("b").tolist()
    assert back == data


def test_what_can_not_be_pickled_stores_nothing(cloud: Cloud, settings: Settings) -> None:
    path = cloud.name()

    with pytest.raises(AttributeError, match="pickle"):
        put_pickle(lambda: 1, BUCKET, path, settings=settings)

    assert gcs_list_blobs(BUCKET, path, settings=settings) == []


def test_a_listing_is_of_what_begins_so_and_knows_no_patterns(
    cloud: Cloud, settings: Settings
) -> None:
    name = cloud.name()
    for path in ("a/1", "a/2/x", "ab", "b*"):
        put("", BUCKET, f"{name}/{path}", settings=settings)

    def listed(prefix: str) -> list[str]:
        paths = gcs_list_blobs(BUCKET, f"{name}/{prefix}", settings=settings)
        return [path.removeprefix(f"{name}/") for path in paths]

    assert listed("") == ["a/1", "a/2/x", "ab", "b*"]
    assert listed("a") == ["a/1", "a/2/x", "ab"]
    assert listed("a/") == ["a/1", "a/2/x"]
    assert listed("*") == []
    assert listed("c") == []


@EACH
@pytest.mark.parametrize(
    "bucket",
    ["gs://mlsys-models-dev", "mlsys-models-dev/x", "b/../c", "", "Models", "a b", "a?b=c"],
)
def test_a_name_that_no_bucket_can_have_is_told_before_anything_is_opened(
    helper: Helper, bucket: str
) -> None:
    nobody = Settings(_env_file=None, storage_emulator_host="http://127.0.0.1:9")

    with pytest.raises(InvalidRequest, match="is not a bucket's name"):
        helper(bucket, "path", settings=nobody)


@pytest.mark.parametrize("path", ["", ".", "..", "a\nb", "a\rb"])
def test_a_path_that_no_object_can_have_is_told(path: str) -> None:
    for helper in (gcs_get, gcs_get_pickle, put_text, put_number):
        with pytest.raises(InvalidRequest, match="is not the path of an object"):
            helper(BUCKET, path)


@EACH
def test_a_bucket_that_is_not_there_is_named(helper: Helper, settings: Settings) -> None:
    with pytest.raises(NotFound, match="gs://no-such-bucket.* does not exist"):
        helper("no-such-bucket", "path", settings=settings)


@EACH
@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (403, AccessDenied, "is not open to these credentials"),
        (401, AccessDenied, "is not open to these credentials"),
        (503, Unavailable, "can't be reached just now"),
    ],
)
def test_what_cloud_storage_refuses_tells_what_to_mend(
    helper: Helper, settings: Settings, status: int, error: type[MlsysError], told: str
) -> None:
    with rest_server() as rest:
        rest.answer = lambda _: google_error(status)
        own = settings.model_copy(update={"storage_emulator_host": rest.url, "retry_seconds": 0.01})
        with pytest.raises(error, match=told) as refused:
            helper(BUCKET, "path", settings=own)

    assert f"gs://{BUCKET}" in str(refused.value)


def test_several_threads_may_store_and_read_at_once(cloud: Cloud, settings: Settings) -> None:
    paths = [cloud.name() for _ in range(8)]

    def there_and_back(path: str) -> bytes:
        put(path, BUCKET, path, settings=settings)
        return gcs_get(BUCKET, path, settings=settings)

    with ThreadPoolExecutor(len(paths)) as threads:
        assert list(threads.map(there_and_back, paths)) == [path.encode() for path in paths]


@EACH
def test_ctrl_c_ends_it_at_once_and_leaves_no_thread(helper: Helper, settings: Settings) -> None:
    over = threading.Event()

    def hold(request: Request) -> Answer:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        over.wait(PATIENCE)
        return 404, b""

    with rest_server() as rest:
        rest.answer = hold
        own = settings.model_copy(update={"storage_emulator_host": rest.url})
        try:
            with pytest.raises(KeyboardInterrupt):
                helper(BUCKET, "path", settings=own)
            mine = [thread for thread in threading.enumerate() if thread.name == "mlsys"]
        finally:
            over.set()

    assert mine == []
