"""What the benchmarks share: the service as a process and what it takes, and how results are told.

A script measures with `service` and `Service.predict`, notes a row of its table after another in a
`Report`, and ends with `Report.save`: a table on the screen, a JSON and a picture in `results/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.models import Kind
from benchmarks.storage_server import ROOT, Synthetic
from mlsys.local import ends_with_us, free_ports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
RESULTS = Path(__file__).parent / "results"
# What the Dockerfile sets of the environment that counts: one arena of each kind to allocate from.
AS_IN_THE_IMAGE = {
    "MALLOC_ARENA_MAX": "1",
    "JE_ARROW_MALLOC_CONF": "narenas:1,dirty_decay_ms:10000",
}

_START_SECONDS = 60
_RUN_SECONDS = 3600
_SAMPLE_SECONDS = 0.5
_WARM_UP_ROWS = 50_000
_PACKAGES = (
    "scikit-learn",
    "pyarrow",
    "pandas",
    "numpy",
    "grpcio",
    "google-cloud-bigquery-storage",
)


# The machine


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": len(psutil.Process().cpu_affinity()) if psutil.LINUX else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "load_before": round(os.getloadavg()[0], 1),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Processes


class ProcessTree:
    """A process and all that it starts: their memory and CPU, looked at while the block lasts.

    The peak is the sum of what each process has held at most (`VmHWM`, so with the interpreter and
    all libraries, and with pages that several share counted for each of them).
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._peak = 0
        self._cpu: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessTree:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            self.look()

    def look(self) -> None:
        peaks = 0
        for process in self._all():
            try:
                times = process.cpu_times()
                peaks += _peak_of(process.pid)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue  # Its last look counts.
            self._cpu[process.pid] = times.user + times.system
        self._peak = max(self._peak, peaks)

    def _all(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def peak(self) -> int:
        """Bytes held at most so far."""
        self.look()
        return self._peak

    def cpu_seconds(self) -> float:
        """CPU seconds of all processes that have been seen, user and system."""
        self.look()
        return sum(self._cpu.values())


def _peak_of(pid: int) -> int:
    if not psutil.LINUX:
        return psutil.Process(pid).memory_info().rss
    status = Path(f"/proc/{pid}/status").read_text()
    told = status.partition("VmHWM:")[2].split()
    return int(told[0]) * 1024 if told else 0


@dataclass(frozen=True)
class Measured:
    """One run of the service.

    `cpu_seconds` are the service's, `server_cpu_seconds` those of the synthetic server meanwhile;
    the peak is since the service started.
    """

    rows: int
    seconds: float
    peak_bytes: int
    cpu_seconds: float
    server_cpu_seconds: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds

    def told(self) -> dict[str, Any]:
        """As columns of a report."""
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "rows_per_second": self.rate,
            "peak_mib": self.peak_bytes / MIB,
        }


@dataclass
class Service:
    """A service in a process of its own, in front of a synthetic server."""

    client: httpx2.Client
    tree: ProcessTree
    synthetic: Synthetic

    def predict(self, kind: Kind, rows: int, **parameters: Any) -> Measured:
        """One run over so many rows; every one of them has to arrive.

        Raises:
            RuntimeError: the service answered an error, or rows are missing.
        """
        wanted = {
            "env": "dev",
            "input_table": self.synthetic.table(kind.table, rows),
            "output_table": self.synthetic.output(f"scored_{time.time_ns()}"),
            "model_name": kind.name,
            "model_version": "v1",
            "id_columns": "id",
        }
        before, cpu = self.synthetic.anew(), self.tree.cpu_seconds()
        start = time.perf_counter()
        answer = self.client.get("/predict", params=wanted | parameters)
        seconds = time.perf_counter() - start
        after = self.synthetic.counted()
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        counts = {after.rows_read, after.rows_appended, after.rows_committed}
        if counts != {rows} or after.ids_read != after.ids_appended or after.errors:
            raise RuntimeError(f"not every row arrived once: {after}")
        return Measured(
            rows=rows,
            seconds=seconds,
            peak_bytes=self.tree.peak(),
            cpu_seconds=self.tree.cpu_seconds() - cpu,
            server_cpu_seconds=after.cpu_seconds - before.cpu_seconds,
        )

    def warm_up(self, kind: Kind) -> None:
        """A small run, so that the model is loaded and nothing is imported in the next one."""
        self.predict(kind, _WARM_UP_ROWS)


@contextmanager
def service(synthetic: Synthetic, **settings: Any) -> Iterator[Service]:
    """Starts the service as its operator does, with these settings; waits until it answers.

    Raises:
        RuntimeError: it did not start; its last words are in the message.
    """
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | AS_IN_THE_IMAGE
    env |= synthetic.servers.env
    env |= {name.upper(): str(value) for name, value in settings.items()}
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "--factory", "service.app:create_app"]
    with (
        # Made before anything is measured: a client reads all certificates that it trusts.
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=_RUN_SECONDS) as client,
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            ends_with_us([*command, "--host", "127.0.0.1", "--port", str(port)]),
            env=env,
            cwd="/",  # A place without an .env.
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            if not _answers(client, process):
                log.seek(0)
                raise RuntimeError(f"The service did not start:\n{log.read()[-2000:]}")
            with ProcessTree(process.pid) as tree:
                yield Service(client, tree, synthetic)
        finally:
            process.terminate()


def _answers(client: httpx2.Client, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return client.get("/health").status_code == 200
        except httpx2.TransportError:
            time.sleep(0.02)
    return False


# Results


def arguments(description: str | None) -> argparse.Namespace:
    """The command line that all scripts share."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small version, to see that it works"
    )
    return parser.parse_args()


@dataclass
class Report:
    """What a script has measured: one table, what was to be shown by it, and a picture.

    `name` is that of its files; the rows have the same columns each.
    """

    name: str
    title: str
    quick: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine)

    def add(self, **row: Any) -> None:
        """Notes a row, and tells it to whoever waits."""
        self.rows.append(row)
        told = ", ".join(f"{heading(k)} {shown(v)}" for k, v in row.items())
        print(f"{self.name}: {told}", file=sys.stderr, flush=True)

    def check(self, what: str, value: float, *, least: float = 0, most: float = 0) -> None:
        """Notes what was to be shown: a value that is to be at least or at most something."""
        good = value >= least if least else value <= most
        self.checks.append(
            {"what": what, "value": value, "least": least, "most": most, "good": good}
        )

    def save(self, draw: Callable[[Figure], None]) -> None:
        """Prints the table, and writes the JSON and the picture.

        Args:
            draw: draws on an empty figure in the style of `mlsys.vis`.
        """
        self._print()
        folder = RESULTS / "quick" if self.quick else RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        told = dataclasses.asdict(self) | {"measured": datetime.now(UTC).date().isoformat()}
        (folder / f"{self.name}.json").write_text(json.dumps(_rounded(told), indent=2) + "\n")
        self._draw(draw, folder / f"{self.name}.png")

    def _print(self) -> None:
        table = Table(title=self.title, title_justify="left")
        for name, value in self.rows[0].items():
            table.add_column(heading(name), justify="right" if _is_number(value) else "left")
        for row in self.rows:
            table.add_row(*map(shown, row.values()))
        console = Console(width=140)
        console.print(table)
        for check in self.checks:
            console.print(("[green]✓ " if check["good"] else "[red]✗ ") + told_check(check))
        for note in self.notes:
            console.print(note)

    def _draw(self, draw: Callable[[Figure], None], path: Path) -> None:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot as plt

        from mlsys import vis

        vis.set_style()
        figure = plt.figure()
        draw(figure)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def told_check(check: Mapping[str, Any]) -> str:
    """One line: what it is, and what it was to be."""
    limit = (
        f"at least {shown(check['least'])}" if check["least"] else f"at most {shown(check['most'])}"
    )
    return f"{check['what']}: {shown(check['value'])} ({limit})"


def heading(name: str) -> str:
    """The name of a column as it is printed."""
    return name.replace("_per_", "/").replace("_mib", ", MiB").replace("_", " ")


def shown(value: Any) -> str:
    """A value as it is printed: three digits are enough of a measured number."""
    match value:
        case None:
            return "—"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float() if value >= 100:
            return f"{value:,.0f}"
        case float():
            return f"{value:.3g}"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rounded(value: Any) -> Any:
    """Four digits of each measured number, so that the JSON can be read."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
        case list():
            return [_rounded(each) for each in value]
    return value


def bars(
    figure: Figure, names: Sequence[str], values: Mapping[str, Sequence[float]], label: str
) -> Any:
    """Groups of bars, one group a name and one bar in each for every one of `values`."""
    axes = figure.add_subplot()
    width = 0.8 / len(values)
    hatches = ("", "///", "...", "xx", "\\\\")
    for number, (title, heights) in enumerate(values.items()):
        at = [place + (number - (len(values) - 1) / 2) * width for place in range(len(names))]
        drawn = axes.bar(at, heights, width, label=title, hatch=hatches[number % 5])
        axes.bar_label(drawn, [shown(float(h)) for h in heights], fontsize=8, padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(label)
    if len(values) > 1:
        axes.legend()
    return axes
