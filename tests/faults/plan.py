"""What goes wrong, and when: a plan names calls by method and number, and counts them as they come.

`AppendRows` and `ReadRows` are the calls that open a stream; `AppendRows.request` and
`ReadRows.message` are what is sent in them, counted over all streams of a run. Calls to Cloud
Storage are `gcs.…` for models and `runs.…` for the run journal, those to the REST API `bq.…`. What
is written to the journal is named by the state that it tells, `runs.upload.prepared`, since a lease
is renewed as often as a run takes long.
"""

from __future__ import annotations

import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import parse_qs, urlsplit

DELAY_SECONDS = 0.1
SILENT_SECONDS = 3600


class Kind(StrEnum):
    """What happens to a call. `applied` says that the server has done what it was asked for."""

    REFUSED = "refused"  # UNAVAILABLE, or 503
    BUSY = "busy"  # RESOURCE_EXHAUSTED with a RetryInfo, or 429 with Retry-After
    CUT = "cut"  # the TCP connection is reset
    LOST = "lost"  # applied; then UNAVAILABLE, or a connection that is closed
    CUT_APPLIED = "cut-applied"  # applied; then the TCP connection is reset
    TRUNCATED = "truncated"  # applied; half of the answer's body comes (HTTP)
    DELAYED = "delayed"  # applied, later
    SILENT = "silent"  # neither applied nor answered, and the connection stays open
    GOAWAY = "goaway"  # applied; the server sends GOAWAY before and closes soon after (gRPC)
    GONE = "gone"  # the streams of a commit are there no more, from now on
    KILLED = "killed"  # SIGKILL to the caller, and the call never arrives
    KILLED_LATE = "killed-late"  # SIGKILL to the caller, and the call is applied later
    KILLED_APPLIED = "killed-applied"  # SIGKILL to the caller once it is applied
    STOPPED = "stopped"  # SIGSTOP to the caller; applied, and the answer waits for SIGCONT


KILLS = frozenset({Kind.KILLED, Kind.KILLED_LATE, Kind.KILLED_APPLIED})


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong: at the `nth` call of that name, counted from 1."""

    call: str
    nth: int
    kind: Kind
    seconds: float = DELAY_SECONDS  # Until a call that is delayed is applied.

    def __str__(self) -> str:
        return f"{self.kind} at {self.call} {self.nth}"


class Plan:
    """The faults to come, and what has been called so far. Servers and tests share it."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self._faults = {(fault.call, fault.nth): fault for fault in faults}
        self.counts: Counter[str] = Counter()
        self.injected: list[Fault] = []
        self.happened = threading.Event()

    def reached(self, call: str) -> Fault | None:
        """Counts a call; the fault that is planned for it, if any."""
        with self._lock:
            self.counts[call] += 1
            fault = self._faults.pop((call, self.counts[call]), None)
            if fault is not None:
                self.injected.append(fault)
                self.happened.set()
            return fault


type Tell = Callable[[signal.Signals], None]

_OBJECTS = re.compile(r"(?P<upload>/upload)?/storage/v1/b/(?P<bucket>[^/]+)/o(?P<object>/.+)?")
_TABLES = re.compile(r"/bigquery/v2/projects/[^/]+(?P<rest>/.*)")
_BIGQUERY = (
    ("GET", r"/datasets/[^/]+/tables/[^/]+", "get_table"),
    ("POST", r"/datasets/[^/]+/tables", "create_table"),
    ("GET", r"/datasets/[^/]+", "get_dataset"),
    ("POST", r"/queries", "query"),
    ("GET", r"/queries/[^/]+", "query_results"),
    ("POST", r"/jobs", "insert_job"),
    ("GET", r"/jobs/[^/]+", "get_job"),
)
_STATE = re.compile(rb'"state": ?"(\w+)"')
_VERBS = {"GET": "get_metadata", "POST": "patch", "PATCH": "patch", "DELETE": "delete"}


def name_of(method: str, target: str, body: bytes = b"") -> str:
    """What a plan calls an HTTP request; `target` is its path and query, as they came."""
    url = urlsplit(target)
    if found := _OBJECTS.fullmatch(url.path):
        place = "runs" if "-runs-" in found["bucket"] else "gcs"
        name = f"{place}.{_object_call(method, found, parse_qs(url.query))}"
        state = _STATE.search(body) if name == "runs.upload" else None
        return f"{name}.{state[1].decode()}" if state else name
    if found := _TABLES.fullmatch(url.path):
        for verb, path, name in _BIGQUERY:
            if verb == method and re.fullmatch(path, found["rest"]):
                return f"bq.{name}"
    return f"{method} {url.path}"


def _object_call(method: str, found: re.Match[str], query: dict[str, list[str]]) -> str:
    if found["upload"]:
        return "upload"
    if found["object"] is None:
        return "list"
    return "download" if query.get("alt") == ["media"] else _VERBS.get(method, method)
