"""Models: found in their environment's bucket, loaded once, kept while there is room.

A pickle runs code as it loads. So one is only ever loaded from the bucket that the settings name
for the environment, which only deployers and the data scientists' group may write.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup
from cachetools import LRUCache
from gcloud.aio.storage import Storage
from pydantic import ValidationError

from mlsys.errors import (
    InvalidRequest,
    ModelUnusable,
    NotFound,
    OutOfMemory,
    Unavailable,
    redacted,
)
from mlsys.frame import FrameKind
from mlsys.gcs import Blob, find_blob, list_blobs, read_blob
from mlsys.metadata import ModelMetadata, first_mistake, golden_mismatch
from mlsys.names import (
    LATEST,
    METADATA_FILE,
    artifact_path,
    parse_artifact_path,
    version_number,
)
from mlsys.tasks import task_group
from service.memory import Memory, told
from service.plan import Feature, ModelNeeds
from service.threads import leave_threads_to_us

_log = structlog.get_logger(__name__)

# What a model takes while it is loaded, by the size of its file: the file, and what is made of it.
_LOADED_TIMES = 2

# To unpickle is to import, and where modules import each other (scipy's do), one of two threads
# that begin at different ones is given a module that is not finished.
_importing = threading.Lock()


@dataclass(frozen=True)
class Model:
    """A loaded model: the estimator, its metadata, and exactly which objects they came from."""

    name: str
    version: str
    blob: Blob
    estimator: Any
    metadata: ModelMetadata
    metadata_blob: Blob | None

    @property
    def uri(self) -> str:
        """Where it was loaded from."""
        return f"gs://{self.blob.bucket}/{self.blob.path}"

    def needs(self) -> ModelNeeds:
        """The columns it asks for: what it was fitted on, else what its metadata says.

        Raises:
            ModelUnusable: neither names the features, or they disagree in number.
        """
        told = {f.name: Feature(f.name, f.type) for f in self.metadata.typed_features()}
        fitted = getattr(self.estimator, "feature_names_in_", None)
        names = list(told) if fitted is None else [str(name) for name in fitted]
        if not names:
            raise ModelUnusable(
                f"{self.uri} was fitted without column names, so the service can't know its "
                'features. List them in metadata.json beside it: {"features": ["Age", …]}.'
            )
        expected = getattr(self.estimator, "n_features_in_", len(names))
        if expected != len(names):
            raise ModelUnusable(
                f"{self.uri} was fitted on {expected} features, but its metadata.json lists "
                f"{len(names)}."
            )
        ids = self.metadata.id_columns
        return ModelNeeds(
            features=tuple(told.get(name, Feature(name)) for name in names),
            frame=frame_kind(self.estimator, self.metadata),
            id_columns=None if ids is None else tuple(ids),
        )


def frame_kind(estimator: Any, metadata: ModelMetadata) -> FrameKind:
    """What an estimator is given: what its metadata says, else what it was fitted on."""
    bare = getattr(estimator, "feature_names_in_", None) is None
    return FrameKind(metadata.frame or ("numpy" if bare else "pandas"))


@dataclass
class _Load:
    """One load under way, and whoever waits for it."""

    done: anyio.Event = field(default_factory=anyio.Event)
    estimator: Any = None
    error: Exception | None = None


_Key = tuple[Blob, Blob | None]


class ModelCache:
    """Estimators by the generations of their files, least recently used first to go.

    Args:
        max_bytes: the size of all artifacts whose estimators are kept. One that is larger than
            that is loaded for each run that needs it.
        tasks: where loads run, so that one goes on when the request that began it goes away.
        memory: what there is room in for models; None: all are taken to fit.
    """

    def __init__(self, max_bytes: int, tasks: TaskGroup, memory: Memory | None = None) -> None:
        self._tasks = tasks
        self._memory = memory
        self._kept: LRUCache[_Key, tuple[int, Any]] = LRUCache(max_bytes, getsizeof=lambda e: e[0])
        self._loads: dict[_Key, _Load] = {}

    async def get(
        self, blob: Blob, load: Callable[[Blob], Any], metadata: Blob | None = None
    ) -> Any:
        """The estimator of `blob`, from the cache or by awaiting `load(blob)`: once, for all.

        Args:
            metadata: by whose golden rows it is trusted. Others ask it anew.

        Raises:
            Whatever `load` raises; the cache is then as it was.
        """
        key = (blob, metadata)
        if (kept := self._kept.get(key)) is not None:
            return kept[1]
        loading = self._loads.get(key)
        if loading is None:
            loading = self._loads[key] = _Load()
            self._tasks.start_soon(self._load, key, load, loading)
        await loading.done.wait()
        if loading.error is not None:
            raise loading.error
        return loading.estimator

    async def make_room(self, blob: Blob) -> None:
        """Lets the models that are kept go, where this one would not fit beside them.

        Raises:
            OutOfMemory: it does not fit all the same.
        """
        memory, size = self._memory, _LOADED_TIMES * blob.size
        if memory is None or memory.fits(size):
            return
        self.clear()
        await memory.release()
        if not memory.fits(size):
            raise OutOfMemory(
                f"gs://{blob.bucket}/{blob.path} takes about {told(size)} to load. This instance "
                f"has {told(memory.limit)} of memory, and {told(memory.used())} of it are in use. "
                "Give it more memory, or try again when it has less to do.",
                retry_after=60,
            )

    def clear(self) -> None:
        """Lets go of every model that is kept; runs go on with those that they have."""
        self._kept.clear()

    async def _load(self, key: _Key, load: Callable[[Blob], Any], loading: _Load) -> None:
        blob, _ = key
        try:
            loading.estimator = await load(blob)
            if blob.size <= self._kept.maxsize:
                self._kept[key] = (blob.size, loading.estimator)
        except Exception as error:
            loading.error = error
        except anyio.get_cancelled_exc_class():  # The task ends here in any case.
            loading.error = Unavailable("The model was not loaded: the service is ending.")
        except BaseException as error:  # Of a model's own code, perhaps: no run but its own ends.
            loading.error = RuntimeError(type(error).__name__)
        finally:
            del self._loads[key]
            loading.done.set()


async def load_model(
    objects: Storage,
    cache: ModelCache,
    *,
    bucket: str,
    name: str,
    version: str,
    pinned: Blob | None = None,
    pinned_metadata: Blob | None = None,
) -> Model:
    """Finds a model and loads it, unless the cache has that generation of it.

    Args:
        version: `v3`, or `latest` for the highest that has a model.pkl.
        pinned: the generation of that version to load; None: the one that is there now.
        pinned_metadata: that of its metadata.json beside it; None: there was none.

    Raises:
        NotFound: there is no such model or version; those there are, are named.
        ModelUnusable: it can't be unpickled here, or its metadata.json can't be read.
        OutOfMemory: there is no room for it here; it is not downloaded.
    """
    if version == LATEST:
        version = await _latest(objects, bucket, name)
    found: dict[str, Any] = {}

    async def find() -> None:
        found["blob"] = pinned or await find_blob(objects, bucket, artifact_path(name, version))

    async def read_metadata() -> None:
        there = pinned_metadata
        if pinned is None:
            path = artifact_path(name, version, METADATA_FILE)
            there = await find_blob(objects, bucket, path)
        found["metadata_blob"] = there
        found["metadata"] = ModelMetadata()
        if there is not None:
            found["metadata"] = await _metadata(objects, there, pinned=pinned is not None)

    async with task_group() as tasks:
        tasks.start_soon(find)
        tasks.start_soon(read_metadata)
    if found["blob"] is None:
        raise NotFound(await _missing(objects, bucket, name, version))

    async def load(blob: Blob) -> Any:
        await cache.make_room(blob)
        return await load_estimator(objects, blob, found["metadata"], pinned=pinned is not None)

    estimator = await cache.get(found["blob"], load, found["metadata_blob"])
    return Model(name, version, found["blob"], estimator, found["metadata"], found["metadata_blob"])


async def load_estimator(
    objects: Storage, blob: Blob, metadata: ModelMetadata, *, pinned: bool = False
) -> Any:
    """Downloads and unpickles an estimator, and asks it the golden rows of its metadata again.

    Raises:
        ModelUnusable: it is another file than its metadata tells of, it can't be unpickled here,
            or answers otherwise than where it was trained.
    """
    data = await _read(objects, blob, pinned=pinned)
    return await anyio.to_thread.run_sync(_unpickle, data, blob, metadata)


async def _versions(objects: Storage, bucket: str, name: str) -> list[str]:
    parsed = [
        parse_artifact_path(blob.path) async for blob in list_blobs(objects, bucket, f"{name}/v")
    ]
    return sorted((each[1] for each in parsed if each), key=version_number)


async def _latest(objects: Storage, bucket: str, name: str) -> str:
    if not (versions := await _versions(objects, bucket, name)):
        raise NotFound(
            f"gs://{bucket} has no model named {name}. Upload one as {name}/v1/model.pkl."
        )
    return versions[-1]


async def _missing(objects: Storage, bucket: str, name: str, version: str) -> str:
    versions = ", ".join((await _versions(objects, bucket, name))[-10:]) or "none"
    return (
        f"gs://{bucket}/{artifact_path(name, version)} does not exist. Versions there: {versions}."
    )


async def _metadata(objects: Storage, blob: Blob, *, pinned: bool) -> ModelMetadata:
    try:
        return ModelMetadata.model_validate_json(await _read(objects, blob, pinned=pinned))
    except ValidationError as error:
        where, what = first_mistake(error)
        raise ModelUnusable(
            f"gs://{blob.bucket}/{blob.path} can't be used: {where} {what}. Mend it and "
            "upload it again."
        ) from error


async def _read(objects: Storage, blob: Blob, *, pinned: bool = False) -> bytes:
    try:
        return await read_blob(objects, blob, pinned=pinned)
    except InvalidRequest as error:  # Nothing that whoever asks for a prediction could mend.
        raise ModelUnusable(str(error)) from error


def _unpickle(data: bytes, blob: Blob, metadata: ModelMetadata) -> Any:
    import joblib

    uri = f"gs://{blob.bucket}/{blob.path}"
    if metadata.sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise ModelUnusable(
            f"{uri} is not the file that its metadata.json was written for: the checksums differ. "
            "Publish both again, as another version."
        )
    try:
        with _importing:
            # Reads what pickle.dump wrote as well as what joblib.dump did.
            estimator = joblib.load(io.BytesIO(data))
    except ModuleNotFoundError as error:
        raise ModelUnusable(
            f"{uri} needs the package {error.name}, which this service lacks. Add it with "
            "`uv add`, and deploy."
        ) from error
    except BaseException as error:  # A pickle may raise anything at all, SystemExit too.
        said = redacted(f"{type(error).__name__}: {error}")
        raise ModelUnusable(
            f"{uri} can't be unpickled ({said}). Save it again with the versions of Python and "
            "scikit-learn that the service runs; classes of your own belong in a package."
        ) from error
    if differs := golden_mismatch(estimator, metadata, frame_kind(estimator, metadata)):
        raise ModelUnusable(
            f"{uri} answers otherwise here than where it was trained: {differs}. It was trained "
            f"with scikit-learn {metadata.sklearn_version or 'of unknown version'}. Train and "
            "publish it again with the versions that the service runs."
        )
    leave_threads_to_us(estimator)
    _log.info("model loaded", uri=uri, generation=blob.generation, bytes=blob.size)
    return estimator
