"""The local servers: they start on ports of their own, and leave nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import anyio
import numpy as np
import psutil
import pyarrow as pa
import pytest

from mlsys import local
from mlsys.bq import bq_get
from mlsys.clients import Clients
from mlsys.errors import Unavailable
from mlsys.gcs import gcs_list_blobs
from mlsys.local import (
    PROJECT,
    LocalServers,
    ends_with_us,
    free_ports,
    load_samples,
    local_servers,
    make_places,
    sample,
)
from mlsys.names import Environment
from mlsys.settings import Settings
from tests.conftest import Cloud
from tests.mlsys.storage_server import PATIENCE


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def descendants() -> dict[int, psutil.Process]:
    return {process.pid: process for process in psutil.Process().children(recursive=True)}


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(5)

    assert len(set(ports)) == 5
    assert not any(map(listens, ports))


def test_a_second_pair_runs_beside_the_first_and_is_stopped_with_all_it_started(
    servers: LocalServers, settings: Settings, cloud: Cloud
) -> None:
    before = descendants()
    with local_servers() as second:
        started = [process for pid, process in descendants().items() if pid not in before]
        addresses = [*second.env.values()][1:]
        assert all(listens(port_of(address)) for address in addresses)
        assert not {*addresses} & {*servers.env.values()}

        own = second.settings(retry_seconds=10)
        tables = anyio.run(load_samples, own)
        again = anyio.run(load_samples, own)

        assert again == tables
        train, test = (bq_get(str(table), "arrow", settings=own) for table in tables)
        assert (train.num_rows, test.num_rows) == (1047, 262)
        assert train.sort_by("PassengerId").equals(sample("titanic_train").sort_by("PassengerId"))
        for env in Environment:
            assert gcs_list_blobs(own.model_bucket(env), settings=own) == []
        # What is in one pair is not in the other.
        assert not cloud.exists(str(tables[0]))

    assert len(started) >= 2
    assert psutil.wait_procs(started, timeout=PATIENCE)[1] == []
    assert not any(listens(port_of(address)) for address in addresses)
    assert listens(port_of(servers.storage))


def test_the_server_keeps_no_copies_of_what_a_table_was_before(cloud: Cloud) -> None:
    path = cloud.put(pa.table({"n": [1, 2]}))

    cloud.put(pa.table({"n": [3, 4]}), path)

    [told] = cloud.query(
        "SELECT COUNT(*) AS tables, COUNTIF(schema_name LIKE '%snapshot%') AS copies "
        "FROM duckdb_tables()"
    )
    assert told["tables"] > 0
    assert told["copies"] == 0


def test_the_server_sends_wide_tables(cloud: Cloud, settings: Settings) -> None:
    columns = {f"f{number}": np.random.default_rng(number).random(70_000) for number in range(60)}
    path = cloud.put(pa.table(columns))

    rows = bq_get(path, settings=settings)

    assert rows.shape == (70_000, 60)
    assert rows["f59"].sum() == pytest.approx(columns["f59"].sum())


# A program that says that it runs by connecting to a port, and does not end when it is told to.
DEAF = """
import signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
socket.create_connection(("127.0.0.1", int(sys.argv[1]))).recv(1)
"""
# A program that runs another one, and does end when it is told to.
STARTER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        opened.settimeout(PATIENCE)
        yield opened


def test_what_a_server_has_started_is_stopped_with_it_even_if_it_does_not_listen(
    listener: socket.socket, tmp_path: Path
) -> None:
    port = str(listener.getsockname()[1])
    command = [sys.executable, "-c", STARTER, "-c", DEAF, port]
    with local._process(command, tmp_path / "log") as process:
        connection, _ = listener.accept()
        [child] = psutil.Process(process.pid).children()

    with connection:
        connection.settimeout(PATIENCE)
        assert connection.recv(1) == b""
    assert psutil.wait_procs([child], timeout=PATIENCE)[1] == []
    assert process.returncode is not None


@pytest.mark.skipif(len(ends_with_us(["x"])) == 1, reason="there is no setpriv here")
def test_a_server_ends_with_the_process_that_has_started_it(
    listener: socket.socket, tmp_path: Path
) -> None:
    ends = DEAF.replace("signal.SIG_IGN", "signal.SIG_DFL")
    command = ends_with_us([sys.executable, "-c", ends, str(listener.getsockname()[1])])
    start = f"import subprocess; subprocess.run({command!r})"
    with subprocess.Popen([sys.executable, "-c", start]) as starter:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE)
            starter.kill()
            assert connection.recv(1) == b""


def test_a_server_that_dies_at_its_start_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descendants()
    (tmp_path / "bqemulator.py").write_text("raise SystemExit('no room on the disk')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    with pytest.raises(Unavailable, match="did not start:\nno room on the disk"), local_servers():
        pass
    assert descendants().keys() == before.keys()


def test_servers_that_are_not_installed_are_told_how_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb_extensions", None)

    with pytest.raises(Unavailable, match="uv sync --group local"), local_servers():
        pass


def test_a_child_process_is_led_to_the_servers(servers: LocalServers) -> None:
    environ = servers.environ()

    assert environ.items() >= servers.env.items()
    assert environ["PATH"] == os.environ["PATH"]
    assert servers.settings().gcp_project_id == PROJECT


def test_settings_of_the_servers_ignore_the_environment(
    servers: LocalServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://elsewhere:1")

    assert servers.settings(chunk_rows=7).storage_emulator_host == servers.storage
    assert servers.settings(chunk_rows=7).chunk_rows == 7


def test_the_samples_are_the_passengers_with_their_gaps() -> None:
    train, test = sample("titanic_train"), sample("titanic_test")

    assert (train.num_rows, test.num_rows) == (1047, 262)
    assert train.column("PassengerId").null_count == 0
    for name in ("Age", "Cabin", "Embarked"):
        assert train.column(name).null_count > 0, name
    assert train.schema.field("Fare").type == pa.float64()
    assert train.schema.field("Sex").type == pa.string()


@pytest.mark.anyio
async def test_places_that_are_there_already_are_left_as_they_are(
    clients: Clients, settings: Settings, cloud: Cloud
) -> None:
    await make_places(clients, settings)
    await make_places(clients, settings)


@pytest.mark.anyio
async def test_a_bucket_that_can_not_be_made_is_an_error(
    clients: Clients, settings: Settings
) -> None:
    with pytest.raises(aiohttp.ClientResponseError):
        await make_places(clients, settings.model_copy(update={"gcs_bucket_models_dev": "_"}))
