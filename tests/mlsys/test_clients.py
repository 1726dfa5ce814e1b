"""Clients: opened for the cloud or for local servers, and what they raise put into our words."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import aiohttp
import anyio
import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.transport.requests import Request as AuthRequest
from google.cloud import bigquery
from google.cloud.bigquery_storage_v1 import types
from google.oauth2 import service_account

from mlsys import errors
from mlsys.clients import (
    SCOPES,
    Clients,
    SharedToken,
    StorageApi,
    open_clients,
    routing,
    vendor_errors,
)
from mlsys.errors import (
    AccessDenied,
    Conflict,
    IntegrityError,
    InvalidRequest,
    MlsysError,
    NotFound,
    Unavailable,
)
from mlsys.local import free_ports
from mlsys.settings import Settings
from tests.mlsys.rest_server import Answer, Request, RestServer, google_error
from tests.mlsys.storage_server import PATIENCE, Fault, StorageServer

CODES = grpc.StatusCode
BY_CODE = {
    CODES.INVALID_ARGUMENT: InvalidRequest,
    CODES.FAILED_PRECONDITION: InvalidRequest,
    CODES.OUT_OF_RANGE: IntegrityError,
    CODES.UNAUTHENTICATED: AccessDenied,
    CODES.PERMISSION_DENIED: AccessDenied,
    CODES.NOT_FOUND: NotFound,
    CODES.ALREADY_EXISTS: Conflict,
}
BY_STATUS = {
    400: InvalidRequest,
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    408: Unavailable,
    409: Conflict,
    412: Conflict,
    418: Unavailable,
    429: Unavailable,
    500: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that names neither servers nor credentials."""
    for name in (*Settings.model_fields, "google_application_credentials", "google_cloud_project"):
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def local(bigquery: str = "http://127.0.0.1:9", **changes: str) -> Settings:
    """Settings for servers on this machine, where nobody listens unless said otherwise."""
    addresses = {
        "gcp_project_id": "my-project",
        "bigquery_emulator_host": bigquery,
        "bigquery_storage_emulator_host": "127.0.0.1:9",
        "storage_emulator_host": "http://127.0.0.1:9",
    }
    return Settings(_env_file=None, **(addresses | changes))


# What they are made of


@pytest.mark.anyio
async def test_clients_of_local_servers_need_no_credentials(settings: Settings) -> None:
    async with open_clients(settings) as clients:
        assert clients.bigquery.project == "mlsys-local"
        datasets = await anyio.to_thread.run_sync(lambda: [*clients.bigquery.list_datasets()])
        page = await clients.objects.list_buckets("mlsys-local")

    assert isinstance(datasets, list)
    assert isinstance(page, list)


@pytest.mark.anyio
async def test_a_local_server_without_a_project_gets_one(anywhere: None) -> None:
    settings = local().model_copy(update={"gcp_project_id": None})
    async with open_clients(settings) as clients:
        assert clients.bigquery.project == "mlsys-local"


@pytest.mark.anyio
async def test_clients_that_were_never_used_are_closed_without_blocking_the_loop(
    anywhere: None,
) -> None:
    # The detector of blocking calls would raise here.
    async with open_clients(local()):
        pass


@pytest.mark.anyio
async def test_clients_are_closed_when_what_uses_them_fails(anywhere: None) -> None:
    opened: list[Clients] = []

    async def fail() -> None:
        async with open_clients(local()) as clients:
            opened.append(clients)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert opened[0].objects.session.session.closed
    with pytest.raises(grpc.aio.UsageError, match="closed"):
        await opened[0].storage.create_write_stream(types.CreateWriteStreamRequest.pb()())


@pytest.mark.anyio
async def test_clients_are_closed_when_what_uses_them_is_cancelled(anywhere: None) -> None:
    opened: list[Clients] = []
    with anyio.CancelScope() as scope:
        async with open_clients(local()) as clients:
            opened.append(clients)
            scope.cancel()
            await anyio.sleep_forever()

    assert opened[0].objects.session.session.closed


@pytest.fixture(scope="module")
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def account(private_key: str, token_uri: str) -> dict[str, str]:
    """A service account that signs for itself and gets its tokens at `token_uri`."""
    return {
        "type": "service_account",
        "project_id": "my-project",
        "private_key_id": "1",
        "private_key": private_key,
        "client_email": "mlsys-sa-dev@my-project.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": token_uri,
    }


@pytest.mark.anyio
async def test_without_local_servers_the_clients_are_googles_with_the_default_credentials(
    anywhere: None, private_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "account.json"
    await anyio.Path(file).write_text(json.dumps(account(private_key, "http://127.0.0.1:9/token")))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    async with open_clients(Settings(_env_file=None)) as clients:
        assert clients.bigquery.project == "my-project"
        assert clients.bigquery._connection.API_BASE_URL == "https://bigquery.googleapis.com"
        assert clients.objects._api_root == "https://www.googleapis.com"
        assert isinstance(clients.storage, StorageApi)


@pytest.mark.anyio
async def test_without_credentials_it_is_said_how_to_get_them(
    anywhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nothing.json"))

    with pytest.raises(AccessDenied, match="gcloud auth application-default login") as raised:
        async with open_clients(Settings(_env_file=None)):
            pass
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.anyio
async def test_credentials_without_a_project_ask_for_one(
    anywhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c"}
    file = tmp_path / "own.json"
    await anyio.Path(file).write_text(json.dumps(own))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    monkeypatch.setenv("NO_GCE_CHECK", "true")

    with pytest.raises(AccessDenied, match="Set GCP_PROJECT_ID"):
        async with open_clients(Settings(_env_file=None)):
            pass


def test_the_routing_header_names_the_resource() -> None:
    assert routing(write_stream="projects/p/streams/s") == (
        ("x-goog-request-params", "write_stream=projects/p/streams/s"),
    )


# What they raise


@pytest.mark.anyio
@pytest.mark.parametrize("code", [code for code in CODES if code is not CODES.OK], ids=str)
async def test_each_status_of_a_call_is_one_of_our_errors(
    server: StorageServer, api: StorageApi, code: grpc.StatusCode
) -> None:
    server.replies["FinalizeWriteStream"].append(Fault(code, "the server's own words"))

    with pytest.raises(MlsysError) as raised, vendor_errors("The stream"):
        await api.finalize_write_stream(types.FinalizeWriteStreamRequest.pb()())
    assert_ours(raised.value, BY_CODE.get(code, Unavailable), "The stream")


@pytest.mark.parametrize("status", BY_STATUS)
def test_each_status_of_bigquerys_rest_api_is_one_of_our_errors(
    rest: RestServer, status: int
) -> None:
    rest.answer = lambda _: google_error(status)
    client = bigquery_client(rest.url)
    with pytest.raises(MlsysError) as raised, vendor_errors("The table"):
        client.get_table("my-project.d.t", retry=None)
    client.close()
    assert type(raised.value) is BY_STATUS[status]
    assert str(raised.value).startswith("The table")


@pytest.mark.parametrize(
    ("status", "reason", "kind", "says"),
    [
        (403, "quotaExceeded", Unavailable, "over a quota"),
        (403, "rateLimitExceeded", Unavailable, "over a quota"),
        (400, "jobRateLimitExceeded", Unavailable, "over a quota"),
        (403, "billingNotEnabled", InvalidRequest, "the server's own words"),
        (403, "responseTooLarge", InvalidRequest, "the server's own words"),
        (403, "blocked", Unavailable, "try again"),
        (400, "tableUnavailable", Unavailable, "try again"),
        (403, "accessDenied", AccessDenied, "Grant them access"),
    ],
)
def test_a_reason_says_more_than_the_status(
    rest: RestServer, status: int, reason: str, kind: type[MlsysError], says: str
) -> None:
    rest.answer = lambda _: google_error(status, reason=reason)
    client = bigquery_client(rest.url)
    with pytest.raises(MlsysError, match=says) as raised, vendor_errors("The table"):
        client.get_table("my-project.d.t", retry=None)
    client.close()
    assert type(raised.value) is kind


@pytest.mark.anyio
async def test_a_used_up_quota_of_the_storage_api_is_called_that(
    server: StorageServer, api: StorageApi
) -> None:
    server.replies["FinalizeWriteStream"].append(Fault(CODES.RESOURCE_EXHAUSTED, "hush"))

    with pytest.raises(Unavailable, match="It is over a quota"), vendor_errors("It"):
        await api.finalize_write_stream(types.FinalizeWriteStreamRequest.pb()())


@pytest.mark.anyio
@pytest.mark.parametrize("status", BY_STATUS)
async def test_each_status_of_cloud_storage_is_one_of_our_errors(
    anywhere: None, rest: RestServer, status: int
) -> None:
    rest.answer = lambda _: google_error(status)
    settings = local(storage_emulator_host=rest.url, retry_seconds=0.1)
    async with open_clients(settings) as clients:
        with pytest.raises(MlsysError) as raised, vendor_errors("The object"):
            await clients.objects.download("bucket", "path")
    assert isinstance(raised.value, BY_STATUS[status])
    assert str(raised.value).startswith("The object ")


def assert_ours(error: MlsysError, kind: type[MlsysError], subject: str) -> None:
    """Checks class and message: only a refusal of the caller's own words is repeated."""
    assert type(error) is kind
    assert str(error).startswith(f"{subject} ")
    assert ("the server's own words" in str(error)) is (kind is InvalidRequest)
    assert error.__cause__ is not None


def bigquery_client(url: str) -> bigquery.Client:
    from google.auth.credentials import AnonymousCredentials

    return bigquery.Client(
        project="my-project",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": url},
    )


@pytest.mark.anyio
async def test_a_port_that_nobody_listens_on_is_unavailable_to_each_client(anywhere: None) -> None:
    [port] = free_ports(1)
    nobody = f"http://127.0.0.1:{port}"
    settings = local(
        nobody,
        bigquery_storage_emulator_host=f"127.0.0.1:{port}",
        storage_emulator_host=nobody,
        retry_seconds=0.1,
    )
    async with open_clients(settings) as clients:

        async def stream() -> None:
            await clients.storage.create_write_stream(types.CreateWriteStreamRequest.pb()())

        async def table() -> None:
            await anyio.to_thread.run_sync(
                lambda: clients.bigquery.get_table("my-project.d.t", retry=None)
            )

        async def blob() -> None:
            await clients.objects.download("bucket", "path")

        for call in (stream, table, blob):
            with pytest.raises(Unavailable, match="It can't be reached"), vendor_errors("It"):
                await call()


class KeepsCalls(grpc.GenericRpcHandler):
    """A server whose streams stay open; it notes where each was called from."""

    def __init__(self, calls: int) -> None:
        self.peers: list[str] = []
        self.all_called = anyio.Event()
        self._calls = calls

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(self._keep)

    async def _keep(self, _: object, context: grpc.aio.ServicerContext) -> None:
        self.peers.append(context.peer())
        if len(self.peers) == self._calls:
            self.all_called.set()
        await anyio.sleep_forever()


@pytest.mark.anyio
async def test_rows_are_read_and_appended_over_several_connections(rest: RestServer) -> None:
    handler = KeepsCalls(calls=4)
    server = grpc.aio.server(handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    settings = local(
        bigquery_emulator_host=rest.url, bigquery_storage_emulator_host=f"127.0.0.1:{port}"
    )
    async with open_clients(settings) as clients:
        calls = [clients.storage.read_rows(types.ReadRowsRequest.pb()()) for _ in range(2)]
        appends = [clients.storage.append_rows() for _ in range(2)]
        for append in appends:
            await append.write(b"")
        with anyio.fail_after(PATIENCE):
            await handler.all_called.wait()
        for call in calls + appends:
            call.cancel()

    assert len(set(handler.peers)) == 4
    await server.stop(None)


class NeverAnswers(grpc.GenericRpcHandler):
    """A server of one method, whatever its name, that tells when it is called."""

    def __init__(self) -> None:
        self.called = anyio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._wait)

    async def _wait(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        self.called.set()
        await anyio.sleep_forever()


@pytest.mark.anyio
async def test_a_call_that_is_cancelled_ends_where_it_was_cancelled() -> None:
    handler = NeverAnswers()
    server = grpc.aio.server(handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        api = StorageApi(channel)
        with anyio.fail_after(PATIENCE), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(api.create_write_stream, types.CreateWriteStreamRequest.pb()())
                await handler.called.wait()
                scope.cancel()

    assert scope.cancelled_caught
    await server.stop(None)


@pytest.mark.anyio
async def test_an_answer_that_takes_too_long_is_unavailable(
    anywhere: None, rest: RestServer
) -> None:
    given_up = threading.Event()

    def answer(_: Request) -> Answer:
        given_up.wait(PATIENCE)
        return 200, b""

    rest.answer = answer
    settings = local(storage_emulator_host=rest.url, retry_seconds=0.1)
    async with open_clients(settings) as clients:
        with pytest.raises(Unavailable), vendor_errors("It"):
            await clients.objects.download("bucket", "path", timeout=0.05)
        given_up.set()


@pytest.mark.parametrize("status", [400, 401])
def test_credentials_that_are_not_taken_are_the_callers(
    rest: RestServer, private_key: str, status: int
) -> None:
    rest.answer = lambda _: (status, {"error": "invalid_grant", "error_description": "hush"})

    with (
        pytest.raises(AccessDenied, match="no usable credentials") as raised,
        vendor_errors("The table"),
    ):
        refresh(private_key, f"{rest.url}/token")
    assert "hush" not in str(raised.value)


def test_a_server_of_tokens_that_is_not_there_is_unavailable(private_key: str) -> None:
    [port] = free_ports(1)

    with pytest.raises(Unavailable), vendor_errors("The table"):
        refresh(private_key, f"http://127.0.0.1:{port}/token")


def refresh(private_key: str, token_uri: str) -> None:
    credentials = service_account.Credentials.from_service_account_info(
        account(private_key, token_uri), scopes=SCOPES
    )
    with AuthRequest().session as session:
        credentials.refresh(AuthRequest(session))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        OSError("no route to host"),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_connection_is_unavailable(error: Exception) -> None:
    with pytest.raises(Unavailable) as raised, vendor_errors("It"):
        raise error
    assert raised.value.__cause__ is error
    assert raised.value.retry_after > 0


@pytest.mark.parametrize("error", [errors.ModelRaised("ours"), ZeroDivisionError()])
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, vendor_errors("It"):
        raise error
    assert raised.value is error


@pytest.mark.anyio
async def test_a_refusal_is_repeated_in_one_short_line(
    server: StorageServer, api: StorageApi
) -> None:
    words = "Syntax error:\n  at [1:7]\n" + "x" * 1000 + "\n\nLocation: US\nJob ID: 4711"
    server.replies["FinalizeWriteStream"].append(Fault(CODES.INVALID_ARGUMENT, words))

    with pytest.raises(InvalidRequest) as raised, vendor_errors("The query"):
        await api.finalize_write_stream(types.FinalizeWriteStreamRequest.pb()())
    assert str(raised.value).startswith("The query was refused: Syntax error: at [1:7] xxx")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400


@pytest.mark.anyio
async def test_who_goes_away_while_a_token_is_fetched_takes_it_from_nobody(
    rest: RestServer,
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def token(request: Request) -> Answer:
        asked.set()
        assert answer.wait(PATIENCE)
        return 200, {"access_token": "t", "expires_in": 3600}

    rest.answer = token
    told = {
        "type": "authorized_user",
        "client_id": "c",
        "client_secret": "s",  # pragma: allowlist secret
        "refresh_token": "r",
        "token_uri": rest.url,
    }
    found: list[str | None] = []

    async def wait(token: SharedToken) -> None:
        found.append(await token.get())

    with anyio.fail_after(PATIENCE):
        async with (
            aiohttp.ClientSession() as session,
            SharedToken(service_file=io.StringIO(json.dumps(told)), session=session) as token,
            anyio.create_task_group() as tasks,
        ):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as goes_away:
                    goes_away.start_soon(wait, token)
                    tasks.start_soon(wait, token)
                    await anyio.to_thread.run_sync(asked.wait, PATIENCE)
                    scope.cancel()
            answer.set()

    assert found == ["t"]
