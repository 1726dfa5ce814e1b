"""The rig: services as processes behind servers that fail as planned, a client, and the oracle.

A client repeats its call with the same run id until it is answered 200. The oracle then reads the
output table and compares it with the input: nothing lost, nothing twice, nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.from_thread
import httpx2
from anyio.from_thread import BlockingPortal

from mlsys.local import PROJECT, LocalServers, ends_with_us
from tests.conftest import Cloud
from tests.faults.models import Doubles
from tests.faults.plan import Fault, Plan
from tests.faults.proxy import Front, front
from tests.service.support import numbers, request_for

ROOT = Path(__file__).parents[2]
ROWS = 2000
LEASE_SECONDS = 1
PATIENCE = 30
RUNS_BUCKET = "mlsys-runs-dev"

# With the journal a run id writes once; without it, only within one call.
JOURNALLED = importlib.util.find_spec("service.journal") is not None

# Small requests, so that a small table makes many of them, and a cache that keeps no model.
SETTINGS = {
    "GCP_PROJECT_ID": PROJECT,
    "GCS_BUCKET_RUNS_DEV": RUNS_BUCKET,
    "READ_STREAMS": "2",
    "CHUNK_ROWS": "300",
    "APPEND_REQUEST_BYTES": "8192",
    "APPEND_UNACKED_BYTES": "65536",
    "MODEL_CACHE_BYTES": "1",
    "RETRY_SECONDS": "3",
    "LEASE_SECONDS": str(LEASE_SECONDS),
    "MAX_RUNS": "8",
}

# What an answer may be besides 200: call again with the same run id.
_AGAIN = {409, 429, 503}
# A client that was told to come back in a second does so sooner, so that tests are quick.
_LONGEST_WAIT = 0.2


class Launcher:
    """A process that starts services by forking."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._lock = threading.Lock()
        self.log = log

    def start(self, env: dict[str, str]) -> tuple[int, str]:
        """Starts a service with this environment; its process id, and where it is."""
        with self._lock:
            self._process.stdin.write(json.dumps(env) + "\n")
            self._process.stdin.flush()
            told = self.told()
        return told["pid"], f"http://127.0.0.1:{told['port']}"

    def told(self) -> dict[str, Any]:
        """The next line that the process has written."""
        line = self._process.stdout.readline()
        assert line, f"the launcher has ended:\n{self.log.read_text()[-3000:]}"
        return json.loads(line)


@contextmanager
def open_launcher(log: Path) -> Iterator[Launcher]:
    """Starts a launcher and waits until it has imported what services need."""
    command = ends_with_us([sys.executable, "-m", "tests.faults.launcher"])
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=env,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        launcher = Launcher(process, log)
        try:
            launcher.told()
            yield launcher
        finally:
            process.kill()


@dataclass(frozen=True)
class Process:
    """A service that runs, or has run."""

    pid: int
    url: str
    handle: int
    client: httpx2.Client

    def ended(self, within: float = 0) -> bool:
        """Whether it has ended, or does so within so many seconds."""
        return bool(select.select([self.handle], [], [], within)[0])

    def peak_memory(self) -> int:
        """The most memory that it has held at once."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def close(self) -> None:
        self.client.close()
        os.close(self.handle)


def start_process(launcher: Launcher, env: Mapping[str, str]) -> Process:
    """Starts a service with these settings."""
    pid, url = launcher.start({"PATH": os.environ["PATH"]} | dict(env))
    return Process(pid, url, os.pidfd_open(pid), httpx2.Client(base_url=url, timeout=PATIENCE))


@contextmanager
def service_alone(launcher: Launcher, env: Mapping[str, str]) -> Iterator[Process]:
    """A service with nothing between it and what `env` names."""
    process = start_process(launcher, env)
    try:
        yield process
    finally:
        signal.pidfd_send_signal(process.handle, signal.SIGKILL)
        process.close()


class Instance:
    """A service behind its front: started again when it is called after it was killed."""

    def __init__(self, launcher: Launcher, behind: Front, **settings: str) -> None:
        self._launcher = launcher
        self._env = SETTINGS | settings | behind.env
        self._starting = threading.Lock()
        self._process: Process | None = None
        self._killed: list[Process] = []
        self.front = behind
        behind.behaviour.tell = self.tell
        self.start()

    @property
    def kills(self) -> int:
        """How often it was killed."""
        return len(self._killed)

    @property
    def plan(self) -> Plan:
        """The plan that its front follows."""
        return self.front.behaviour.plan

    def follow(self, faults: Iterable[Fault]) -> Plan:
        """Sets a new plan, which counts from nothing."""
        self.front.behaviour.plan = Plan(faults)
        return self.plan

    def start(self) -> Process:
        """The running process, a new one where there is none."""
        with self._starting:
            if self._process is None:
                self._process = start_process(self._launcher, self._env)
            return self._process

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal to the service. Waits for nothing: servers call this, too."""
        process = self._process
        if process is None:
            return
        signal.pidfd_send_signal(process.handle, number)
        if number == signal.SIGKILL:
            self._process = None
            self._killed.append(process)

    def ends(self, within: float) -> bool:
        """Whether the service ends by itself."""
        return self.start().ended(within)

    def close(self) -> None:
        """Ends the service."""
        self.tell(signal.SIGKILL)
        for process in self._killed:
            process.close()

    def get(self, path: str, **parameters: Any) -> httpx2.Response | None:
        """One call; None where the service was killed before it answered."""
        process = self.start()
        try:
            return process.client.get(path, params=parameters)
        except httpx2.TransportError:
            if process.ended(within=1):
                return None
            raise

    def peak_memory(self) -> int:
        """The most memory that the service has held at once."""
        return self.start().peak_memory()


@dataclass(frozen=True)
class Figures:
    """The output table of one run, compared with its input."""

    rows: int
    lost: int
    duplicated: int
    unexpected: int
    stamps: int

    @property
    def nothing(self) -> bool:
        return self.rows == 0

    @property
    def once(self) -> bool:
        """Whether every row is there once, by one run."""
        return (self.lost, self.duplicated, self.unexpected, self.stamps) == (0, 0, 0, 1)


def look(cloud: Cloud, output: str, rows: int = ROWS) -> Figures:
    """Reads an output table, past everything that fails; `rows` are the ids 0, 1, … of its input.

    A row whose prediction is not twice its id is another one's: unexpected.
    """
    if not cloud.exists(output):
        return Figures(0, rows, 0, 0, 0)
    its_own = f"id BETWEEN 0 AND {rows - 1} AND Prediction = 2 * id"
    [told] = cloud.query(
        f"SELECT COUNTIF({its_own}) AS good, COUNT(DISTINCT IF({its_own}, id, NULL)) AS ids, "
        f"COUNT(*) AS n, COUNT(DISTINCT PredictionTimestamp) AS stamps FROM `{output}`"
    )
    return Figures(
        rows=told["n"],
        lost=rows - told["ids"],
        duplicated=told["good"] - told["ids"],
        unexpected=told["n"] - told["good"],
        stamps=told["stamps"],
    )


@dataclass
class Story:
    """What came of a call that was repeated until it was answered 200."""

    run_id: str
    output: str
    answers: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None


class Rig:
    """Local servers, services behind fronts, and tables to predict."""

    def __init__(self, cloud: Cloud, portal: BlockingPortal, instances: Sequence[Instance]) -> None:
        self.cloud = cloud
        self._portal = portal
        self.instances = list(instances)
        self.input = cloud.put(numbers(ROWS))
        self.model = cloud.publish(Doubles(), target="Prediction", features=["x"])

    @property
    def instance(self) -> Instance:
        return self.instances[0]

    def wanted(self, **more: Any) -> dict[str, Any]:
        """The parameters of a run that is called so for the first time, into a new table."""
        run_id = f"run-{uuid.uuid4().hex[:12]}"
        output = self.cloud.new_table("out")
        return request_for(self.input, output, self.model, run_id=run_id) | more

    def settle(self) -> None:
        """Waits until every call that is applied late has been."""
        for instance in self.instances:
            self._portal.call(instance.front.settle)

    def look(self, wanted: dict[str, Any]) -> Figures:
        return look(self.cloud, wanted["output_table"])

    def until_done(
        self,
        wanted: dict[str, Any],
        *,
        seconds: float = PATIENCE,
        choose: Callable[[], Instance] | None = None,
    ) -> Story:
        """Repeats a call until it is answered 200. After each that is not, all or nothing is there.

        Args:
            choose: the instance that the next call goes to; the first by default.
        """
        story = Story(wanted["run_id"], wanted["output_table"])
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            response = (choose() if choose else self.instance).get("/predict", **wanted)
            story.answers.append(_told(response))
            if response is not None and response.status_code == 200:
                story.result = response.json()
                return story
            figures = self.look(wanted)
            assert figures.nothing or figures.once, (figures, story.answers)
            if response is not None:
                _wait(response, story)
        raise AssertionError(f"no 200 within {seconds} s: {story.answers}")


def _wait(response: httpx2.Response, story: Story) -> None:
    """Does what a client does that was told to come back later."""
    assert response.status_code in _AGAIN, story.answers
    assert "Retry-After" in response.headers, story.answers
    time.sleep(min(float(response.headers["Retry-After"]), _LONGEST_WAIT))


def _told(response: httpx2.Response | None) -> str:
    if response is None:
        return "gone"
    if response.status_code == 200:
        return "200"
    return f"{response.status_code} {response.json().get('detail', '')}"


def make_bucket(servers: LocalServers, name: str) -> None:
    """Makes a bucket, unless it is there."""
    answer = httpx2.post(f"{servers.storage}/storage/v1/b", json={"name": name})
    assert answer.status_code in {200, 409}, answer.text


@contextmanager
def open_rig(
    servers: LocalServers, cloud: Cloud, launcher: Launcher, instances: int = 1, **settings: str
) -> Iterator[Rig]:
    """Services of these settings, each behind a front of its own."""
    make_bucket(servers, RUNS_BUCKET)
    with ExitStack() as stack:
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        running, gone = [], set()
        for _ in range(instances):
            behind = stack.enter_context(portal.wrap_async_context_manager(front(servers, gone)))
            running.append(Instance(launcher, behind, **settings))
            stack.callback(running[-1].close)
        yield Rig(cloud, portal, running)
