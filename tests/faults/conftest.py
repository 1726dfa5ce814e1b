"""What the fault tests share: a launcher of services, and a rig with one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlsys.local import LocalServers
from tests.conftest import Cloud
from tests.faults.rig import Launcher, Rig, open_launcher, open_rig


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with open_launcher(tmp_path_factory.mktemp("faults") / "services.log") as running:
        yield running


@pytest.fixture(scope="module")
def rig(servers: LocalServers, cloud: Cloud, launcher: Launcher) -> Iterator[Rig]:
    with open_rig(servers, cloud, launcher) as running:
        yield running
