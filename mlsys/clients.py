"""Google's clients, real or local: the only place that knows endpoints and credentials.

The Storage APIs are called through callables of our own on a `grpc.aio` channel, with the raw
protobuf types: the generated clients wrap each message (2.7 ms for an append of 1 MB against
0.11 ms), retry a bidirectional call by pulling its requests a second time, and resume a read only
before its first message.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio
import grpc
from gcloud.aio.auth import Token
from gcloud.aio.storage import Storage
from google.api_core import exceptions as api_exceptions
from google.auth import exceptions as auth_exceptions
from google.cloud.bigquery_storage_v1 import types

from mlsys import errors
from mlsys.retry import retrying
from mlsys.settings import Settings
from mlsys.wire import rows_of

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from google.cloud import bigquery

STORAGE_HOST = "bigquerystorage.googleapis.com:443"
_PACKAGE = "/google.cloud.bigquery.storage.v1"
_CLOSE_SECONDS = 10
SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)

# Messages of the Storage APIs may be 128 MB. Window growth is turned off because a slow reader of
# 8 streams was seen to buffer 2,196 MB with it and 74 MB without; the look-ahead wins back most of
# the throughput that costs over a real network.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Or channels with the same options would have one connection between them.
    ("grpc.use_local_subchannel_pool", 1),
)

# Rows go over so many connections by turns: what is read does not wait behind what is appended.
# A connection is made when the first call needs it.
_CONNECTIONS = 4


class StorageApi:
    """The methods of the BigQuery Storage Read and Write APIs, as raw `grpc.aio` callables.

    They take and answer protobuf's own types, but for the two that carry rows (see `mlsys.wire`):
    `read_rows` answers serialized record batches, and `append_rows` takes serialized requests.

    Args:
        channels: that the calls of these two use by turns; all others use the first.
    """

    def __init__(self, *channels: grpc.aio.Channel) -> None:
        turns = itertools.cycle(range(len(channels)))

        def stream(
            kind: str,
            name: str,
            serializer: Callable[[Any], bytes] | None,
            deserializer: Callable[[bytes], Any],
        ) -> Any:
            methods = [
                getattr(channel, kind)(f"{_PACKAGE}.{name}", serializer, deserializer)
                for channel in channels
            ]
            return lambda *request, **options: methods[next(turns)](*request, **options)

        def unary(name: str, request: Any, response: Any) -> Any:
            method = channels[0].unary_unary(
                f"{_PACKAGE}.{name}", _serializer(request), _deserializer(response)
            )
            return partial(_answer, method)

        read, write = "BigQueryRead", "BigQueryWrite"
        self.create_read_session = unary(
            f"{read}/CreateReadSession", types.CreateReadSessionRequest, types.ReadSession
        )
        # Not a message of protobuf's, which would hold the rows a second time.
        self.read_rows = stream(
            "unary_stream", f"{read}/ReadRows", _serializer(types.ReadRowsRequest), rows_of
        )
        self.create_write_stream = unary(
            f"{write}/CreateWriteStream", types.CreateWriteStreamRequest, types.WriteStream
        )
        self.append_rows = stream(
            "stream_stream", f"{write}/AppendRows", None, _deserializer(types.AppendRowsResponse)
        )
        self.finalize_write_stream = unary(
            f"{write}/FinalizeWriteStream",
            types.FinalizeWriteStreamRequest,
            types.FinalizeWriteStreamResponse,
        )
        self.batch_commit_write_streams = unary(
            f"{write}/BatchCommitWriteStreams",
            types.BatchCommitWriteStreamsRequest,
            types.BatchCommitWriteStreamsResponse,
        )


def _serializer(message: Any) -> Callable[[Any], bytes]:
    return message.pb().SerializeToString


def _deserializer(message: Any) -> Callable[[bytes], Any]:
    return message.pb().FromString


async def _answer(callable: Any, *request: Any, **options: Any) -> Any:
    """Awaits a call of one message, and ends it where whoever waits is cancelled.

    grpcio raises a CancelledError of its own in the place of the one that it was sent, and anyio
    then takes it for somebody else's: a timeout would not end where it was set.
    """
    call = callable(*request, **options)
    answer = asyncio.ensure_future(call)
    try:
        await asyncio.wait([answer])
    finally:
        if not answer.done():
            call.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([answer])
    return answer.result()


def routing(**resource: str) -> tuple[tuple[str, str], ...]:
    """The header by which Google routes a call to the region that holds the resource."""
    return (("x-goog-request-params", "&".join(f"{k}={v}" for k, v in resource.items())),)


@dataclass(frozen=True)
class Clients:
    """What talks to Google Cloud: tables over REST, rows over gRPC, objects over HTTP."""

    bigquery: bigquery.Client
    storage: StorageApi
    objects: Storage


@asynccontextmanager
async def open_clients(settings: Settings) -> AsyncIterator[Clients]:
    """Opens every client and closes them in reverse.

    Raises:
        AccessDenied: there are no credentials, and no local server either; or they name no
            project, and no setting does.
    """
    with vendor_errors("Google Cloud"):
        credentials = await anyio.to_thread.run_sync(_credentials, settings)
        client = await anyio.to_thread.run_sync(_bigquery_client, settings, credentials)
    try:
        async with (
            AsyncExitStack() as stack,
            aiohttp.ClientSession() as session,
            _objects(settings, session) as objects,
        ):
            channels = [
                await stack.enter_async_context(_channel(settings, credentials))
                for _ in range(_CONNECTIONS)
            ]
            yield Clients(client, StorageApi(*channels), objects)
    finally:
        # Closing a client that was never used makes it look for certificates on disk.
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await anyio.to_thread.run_sync(client.close, abandon_on_cancel=True)


def _credentials(settings: Settings) -> Credentials:
    import google.auth
    from google.auth.credentials import AnonymousCredentials

    if settings.bigquery_emulator_host and settings.bigquery_storage_emulator_host:
        return AnonymousCredentials()
    return google.auth.default(scopes=SCOPES)[0]


def _bigquery_client(settings: Settings, credentials: Credentials) -> bigquery.Client:
    from google.cloud import bigquery

    options = None
    project = settings.gcp_project_id
    if settings.bigquery_emulator_host:
        options = {"api_endpoint": settings.bigquery_emulator_host}
        project = project or "mlsys-local"
    try:
        return bigquery.Client(project=project, credentials=credentials, client_options=options)
    except OSError as error:
        raise errors.AccessDenied(
            "The credentials belong to no project. Set GCP_PROJECT_ID to the one that pays."
        ) from error


def _channel(settings: Settings, credentials: Credentials) -> grpc.aio.Channel:
    if settings.bigquery_storage_emulator_host:
        return grpc.aio.insecure_channel(settings.bigquery_storage_emulator_host, CHANNEL_OPTIONS)
    from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
        BigQueryReadGrpcAsyncIOTransport as Transport,
    )

    return Transport.create_channel(
        STORAGE_HOST, credentials=credentials, scopes=SCOPES, options=CHANNEL_OPTIONS
    )


class SharedToken(Token):
    """An access token that one task fetches for all who wait for it.

    The client cancels that task with whoever is cancelled first, and then nobody else gets one.
    """

    async def ensure_token(self) -> None:
        await asyncio.shield(super().ensure_token())


class _Objects(Storage):
    """Cloud Storage, each call tried again for as long as `retry_seconds` where that may help.

    `_download` is what all of the client's calls that read an object or its metadata go through.
    A write whose answer was lost is made twice: see `mlsys.gcs.write_blob`.
    """

    def __init__(self, retry_seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = retry_seconds

    async def list_objects(self, *args: Any, **options: Any) -> Any:
        call = super().list_objects
        return await retrying(lambda: call(*args, **options), seconds=self._seconds)

    async def upload(self, *args: Any, **options: Any) -> Any:
        call = super().upload
        return await retrying(lambda: call(*args, **options), seconds=self._seconds)

    async def _download(self, *args: Any, **options: Any) -> Any:
        call = super()._download
        return await retrying(lambda: call(*args, **options), seconds=self._seconds)


@asynccontextmanager
async def _objects(settings: Settings, session: aiohttp.ClientSession) -> AsyncIterator[Storage]:
    host = settings.storage_emulator_host
    async with SharedToken(session=session, scopes=SCOPES) as token:
        yield _Objects(
            settings.retry_seconds,
            session=session,
            token=token,
            api_root=host,
            api_is_dev=bool(host),
        )


_BY_STATUS = {
    400: errors.InvalidRequest,
    401: errors.AccessDenied,
    403: errors.AccessDenied,
    404: errors.NotFound,
    409: errors.Conflict,
    412: errors.Conflict,
    408: errors.Unavailable,
    429: errors.Unavailable,
    500: errors.Unavailable,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
}
# Where a status alone would mislead: 403 stands for a quota as well as for missing access.
# https://cloud.google.com/bigquery/docs/error-messages#errortable
_BY_REASON = {
    "billingNotEnabled": errors.InvalidRequest,
    "responseTooLarge": errors.InvalidRequest,
    "blocked": errors.Unavailable,
    "jobBackendError": errors.Unavailable,
    "jobInternalError": errors.Unavailable,
    "tableUnavailable": errors.Unavailable,
}
_QUOTA_REASONS = {"quotaExceeded", "rateLimitExceeded", "jobRateLimitExceeded"}
_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.IntegrityError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.Conflict,
}
_SAID = {
    errors.InvalidRequest: "was refused",
    errors.AccessDenied: "is not open to these credentials. Grant them access, or sign in with "
    "`gcloud auth application-default login`",
    errors.NotFound: "does not exist. Check its name and its project",
    errors.Conflict: "exists already, or was changed by somebody else",
    errors.IntegrityError: "lost an append",
    errors.Unavailable: "can't be reached just now; try again",
}
_OVER_QUOTA = "is over a quota of the project; try again later, or ask Google for more"


@contextmanager
def vendor_errors(subject: str) -> Iterator[None]:
    """Translates what Google's clients raise into our own errors, about `subject`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise errors.Unavailable(f"{subject} {_OVER_QUOTA}.") from error
        ours = _BY_CODE.get(error.code(), errors.Unavailable)
        raise _ours(ours, subject, error.details()) from error
    except api_exceptions.GoogleAPICallError as error:
        reasons = [each.get("reason") for each in error.errors if isinstance(each, dict)]
        if error.code == 429 or _QUOTA_REASONS.intersection(reasons):
            raise errors.Unavailable(f"{subject} {_OVER_QUOTA}.") from error
        by_reason = next((_BY_REASON[each] for each in reasons if each in _BY_REASON), None)
        ours = by_reason or _BY_STATUS.get(error.code or 500, errors.Unavailable)
        raise _ours(ours, subject, error.message) from error
    except aiohttp.ClientResponseError as error:
        ours = _BY_STATUS.get(error.status, errors.Unavailable)
        raise _ours(ours, subject, None) from error
    except auth_exceptions.TransportError as error:
        raise _ours(errors.Unavailable, subject, None) from error
    except auth_exceptions.GoogleAuthError as error:
        raise errors.AccessDenied(
            f"{subject}: no usable credentials. Sign in with "
            "`gcloud auth application-default login`, or run `mlsys local` and export the settings "
            "it prints."
        ) from error
    except (OSError, aiohttp.ClientError, api_exceptions.RetryError) as error:
        raise _ours(errors.Unavailable, subject, None) from error


def _ours(kind: type[errors.MlsysError], subject: str, details: str | None) -> errors.MlsysError:
    message = f"{subject} {_SAID[kind]}."
    if details and kind is errors.InvalidRequest:
        # Only a refusal of the caller's own words is worth repeating: the filter, mostly.
        # What follows an empty line is the job's id and place.
        said = " ".join(details.partition("\n\n")[0].split())
        message = f"{subject} {_SAID[kind]}: {said[:300]}"
    return kind(message)
