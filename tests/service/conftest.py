"""What the tests of the service share: the asyncio backend, and servers that stand in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mlsys.settings import Settings
from tests.conftest import Client, Cloud
from tests.service import models
from tests.service.support import ObjectsProxy, RowsProxy, objects_proxy, rows_proxy


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def doubles(cloud: Cloud) -> str:
    """The name of a model that doubles `x`."""
    return cloud.publish(models.Doubles())


@pytest.fixture
def gate(cloud: Cloud) -> Iterator[str]:
    """The name of a gated model, and of its events; it is let go after the test."""
    name = cloud.name("gate").replace("_", "-")
    cloud.publish(models.Gated(name), name)
    yield name
    models.event(f"{name} open").set()


@pytest.fixture
def objects(settings: Settings) -> Iterator[ObjectsProxy]:
    """A server in front of Cloud Storage."""
    with objects_proxy(settings.storage_emulator_host) as between:
        yield between


@pytest.fixture
def rows(settings: Settings) -> Iterator[RowsProxy]:
    """A server in front of the BigQuery Storage APIs."""
    with rows_proxy(settings.bigquery_storage_emulator_host) as between:
        yield between


@pytest.fixture
def start_behind(
    objects: ObjectsProxy, rows: RowsProxy, start_service: Callable[..., Client]
) -> Callable[..., Client]:
    """Starts a service that talks to the cloud through `objects` and `rows`."""
    places = {
        "storage_emulator_host": objects.url,
        "bigquery_storage_emulator_host": rows.address,
    }
    return lambda **changes: start_service(**(places | changes))
