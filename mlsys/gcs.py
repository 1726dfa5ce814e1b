"""Cloud Storage: objects looked up, listed, read and written.

    gcs_put(text, "my-bucket", "notes/today.txt")
    model = gcs_get_pickle("mlsys-models-dev", "titanic-survival/v1/model.pkl")

The functions that begin with `gcs_` are for scripts and notebooks; the others are what they and
the service are made of.
"""

from __future__ import annotations

import base64
import io
import pickle
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import aiohttp
import google_crc32c
from gcloud.aio.storage import Storage

from mlsys.blocking import blocking
from mlsys.clients import vendor_errors
from mlsys.errors import Changed, Conflict, InvalidRequest, NotFound
from mlsys.names import shown
from mlsys.progress import wait_bar
from mlsys.settings import Settings

_STAT_SECONDS = 30
_TRANSFER_SECONDS = 600

# The most that Cloud Storage puts on a page, and what it does by default.
_PAGE_OBJECTS = 1000


# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Blob:
    """One generation of one object."""

    bucket: str
    path: str
    generation: int
    size: int
    crc32c: str
    updated: datetime | None = None
    created: datetime | None = field(default=None, compare=False)
    uploader: str | None = field(default=None, compare=False)
    encoding: str | None = field(default=None, compare=False)
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, resource: dict[str, Any]) -> Blob:
        return cls(
            bucket=resource["bucket"],
            path=resource["name"],
            generation=int(resource["generation"]),
            size=int(resource["size"]),
            crc32c=resource.get("crc32c", ""),
            updated=_time(resource.get("updated")),
            created=_time(resource.get("timeCreated")),
            uploader=_uploader(resource),
            encoding=resource.get("contentEncoding"),
            labels=resource.get("metadata") or {},
        )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _uploader(resource: dict[str, Any]) -> str | None:
    """Who an object says uploaded it, else its owner, which only buckets with ACLs tell."""
    said = (resource.get("metadata") or {}).get("uploader")
    return said or (resource.get("owner") or {}).get("entity")


async def find_blob(
    objects: Storage, bucket: str, path: str, *, try_seconds: float = _STAT_SECONDS
) -> Blob | None:
    """Looks an object up; None where there is none. A try may take so many seconds."""
    with vendor_errors(f"gs://{bucket}/{path}"):
        try:
            return Blob.of(await objects.download_metadata(bucket, path, timeout=try_seconds))
        except aiohttp.ClientResponseError as error:
            if error.status == 404:
                return None
            raise


async def read_blob(
    objects: Storage, blob: Blob, *, pinned: bool = False, try_seconds: float = _TRANSFER_SECONDS
) -> bytes:
    """Downloads an object and checks that it is the generation that was looked up.

    Args:
        pinned: ask for that generation, which a versioned bucket has though it was replaced.
        try_seconds: how long a try may take.

    Raises:
        NotFound: the object, or that generation of it, is gone.
        Changed: what arrived is not what was looked up: damaged, or replaced meanwhile.
        InvalidRequest: it is stored with a Content-Encoding, which is undone on the way.
        Unavailable: no answer.
    """
    if blob.encoding:
        raise InvalidRequest(
            f"gs://{blob.bucket}/{blob.path} is stored with Content-Encoding {blob.encoding}, so "
            "what arrives can't be checked. Upload it without."
        )
    with vendor_errors(f"gs://{blob.bucket}/{blob.path}"):
        data = await _download(objects, blob, pinned, try_seconds)
    if crc32c(data) != blob.crc32c:
        raise Changed(
            f"gs://{blob.bucket}/{blob.path} changed while it was read. Try again.", retry_after=1
        )
    return data


async def _download(objects: Storage, blob: Blob, pinned: bool, try_seconds: float) -> bytes:
    if not pinned:
        return await objects.download(blob.bucket, blob.path, timeout=try_seconds)
    # The client's public call takes no generation.
    params = {"alt": "media", "generation": str(blob.generation)}
    return await objects._download(blob.bucket, blob.path, params=params, timeout=try_seconds)


def crc32c(data: bytes) -> str:
    """The checksum that Cloud Storage keeps of an object: big-endian, in base64."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


async def list_blobs(objects: Storage, bucket: str, prefix: str = "") -> AsyncIterator[Blob]:
    """Yields the objects whose path begins with `prefix`, in the order of their paths."""
    params = {"prefix": prefix, "maxResults": str(_PAGE_OBJECTS)}
    while True:
        with vendor_errors(f"gs://{bucket}"):
            page = await objects.list_objects(bucket, params=params, timeout=_STAT_SECONDS)
        for resource in page.get("items", ()):
            yield Blob.of(resource)
        if not (token := page.get("nextPageToken")):
            return
        params["pageToken"] = token


async def write_blob(
    objects: Storage,
    bucket: str,
    path: str,
    data: bytes,
    content_type: str = "application/octet-stream",
    *,
    if_generation: int | None = None,
    labels: Mapping[str, str] | None = None,
    try_seconds: float = _TRANSFER_SECONDS,
) -> Blob:
    """Stores `data` as a new generation of an object.

    With `if_generation` the answer may be lost and the write not, and then it is refused when it
    is tried again. So a refusal counts as success where the same bytes are there.

    Args:
        if_generation: store it only in the place of that generation; 0: only where there is no
            such object yet.
        labels: custom metadata of the object.
        try_seconds: how long a try may take.

    Raises:
        Conflict: it has another generation.
        NotFound, AccessDenied, Unavailable: as the names say.
    """
    condition = None if if_generation is None else {"ifGenerationMatch": str(if_generation)}
    try:
        with vendor_errors(f"gs://{bucket}/{path}"):
            resource = await objects.upload(
                bucket,
                path,
                data,
                content_type=content_type,
                # One request with metadata: the only kind whose condition the local server keeps.
                metadata={"Content-Type": content_type, "metadata": dict(labels or {})},
                force_resumable_upload=False,
                parameters=condition,
                timeout=try_seconds,
            )
    except Conflict:
        seconds = min(try_seconds, _STAT_SECONDS)
        there = await find_blob(objects, bucket, path, try_seconds=seconds)
        if there is None or there.crc32c != crc32c(data):
            raise
        return there
    return Blob.of(resource)


def _check_place(bucket: str, path: str | None = None) -> None:
    if _BUCKET.fullmatch(bucket) is None:
        raise InvalidRequest(
            f"{shown(bucket)} is not a bucket's name. Give the name alone, such as "
            "mlsys-models-dev."
        )
    if path is not None and (path in ("", ".", "..") or "\n" in path or "\r" in path):
        raise InvalidRequest(f"{shown(path)} is not the path of an object in a bucket.")


def gcs_get(bucket_name: str, blob_path: str, *, settings: Settings | None = None) -> bytes:
    """The bytes of an object.

    Raises:
        InvalidRequest: a name that no bucket or object can have.
        NotFound: no such bucket or object.
        AccessDenied, Unavailable: no credentials or no access; no answer.
    """
    _check_place(bucket_name, blob_path)

    async def get(objects: Storage) -> bytes:
        blob = await find_blob(objects, bucket_name, blob_path)
        if blob is None:
            raise NotFound(f"gs://{bucket_name}/{blob_path} does not exist. Check both names.")
        return await read_blob(objects, blob)

    with wait_bar("reading"), blocking(settings) as (loop, clients, _):
        return loop.call(get, clients.objects)


def gcs_put(
    data: bytes | str, bucket_name: str, blob_path: str, *, settings: Settings | None = None
) -> None:
    """Stores bytes, or text as UTF-8, as an object; one that is there is replaced.

    Raises:
        NotFound: no such bucket.
        InvalidRequest: `data` is neither bytes nor text, or a name that no bucket or object can
            have.
        AccessDenied, Unavailable: no credentials or no access; no answer.
    """
    _check_place(bucket_name, blob_path)
    if not isinstance(data, bytes | bytearray | memoryview | str):
        raise InvalidRequest(
            f"A {type(data).__name__} is neither bytes nor text. Use gcs_put_pickle for objects."
        )
    text = isinstance(data, str)
    content = data.encode() if text else bytes(data)
    content_type = "text/plain; charset=utf-8" if text else "application/octet-stream"
    with wait_bar("writing"), blocking(settings) as (loop, clients, _):
        loop.call(write_blob, clients.objects, bucket_name, blob_path, content, content_type)


def gcs_get_pickle(bucket_name: str, blob_path: str, *, settings: Settings | None = None) -> Any:
    """The object that was stored by `gcs_put_pickle`, `pickle.dump` or `joblib.dump`.

    A pickle runs code as it loads: read only from buckets that you trust. Raises what `gcs_get`
    raises, and whatever the pickle does.
    """
    import joblib

    return joblib.load(io.BytesIO(gcs_get(bucket_name, blob_path, settings=settings)))


def gcs_put_pickle(
    data: Any, bucket_name: str, blob_path: str, *, settings: Settings | None = None
) -> None:
    """Stores a Python object as a pickle. Raises what `gcs_put` raises."""
    gcs_put(pickle.dumps(data), bucket_name, blob_path, settings=settings)


def gcs_list_blobs(
    bucket_name: str, blob_path: str = "", *, settings: Settings | None = None
) -> list[str]:
    """The paths of the objects whose path begins with `blob_path`, in order.

    Raises:
        InvalidRequest: a name that no bucket can have.
        NotFound: no such bucket.
        AccessDenied, Unavailable: no credentials or no access; no answer.
    """
    _check_place(bucket_name)

    async def paths(objects: Storage) -> list[str]:
        return [blob.path async for blob in list_blobs(objects, bucket_name, blob_path)]

    with wait_bar("listing"), blocking(settings) as (loop, clients, _):
        return loop.call(paths, clients.objects)
