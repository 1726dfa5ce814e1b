"""The most memory that the service holds, by the rows of a run and by how fast they are taken.

    python -m benchmarks.memory [--quick]

Each figure is of a service that has done nothing before and is told that it has 512 MiB, those of
Cloud Run's default instance, with a linear model and 11 columns. Three runs are over 1, 10 and 100
million rows. The service has two read streams and two predict calls at once, whatever the machine:
each more takes memory. The slow writer takes 8 MB a second, 200,000 rows or so. The paused writer
takes half of the rows and answers no more, until nothing has moved for a while.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from benchmarks import models
from benchmarks.harness import MIB, Measured, Report, arguments, bars, service
from benchmarks.storage_server import Synthetic, synthetic_servers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MIB = 512
MOST_MORE = 1.05
TWO_CORES = {"read_streams": 2, "predict_threads": 2}
SIZES = (1_000_000, 10_000_000, 100_000_000)
# Bytes a second; a row of the output is about 40.
SLOW = 8_000_000
_STILL_SECONDS = 3
_LOOK_SECONDS = 0.2


def main() -> None:
    options = arguments(__doc__)
    report = Report("memory", "The most memory the service holds", options.quick)
    sizes = SIZES[:2] if options.quick else SIZES
    with synthetic_servers() as synthetic:
        models.publish(synthetic.servers.settings(), models.LINEAR)
        peaks = [note(report, f"{rows:,} rows", run(synthetic, rows)) for rows in sizes]
        peaks.append(note(report, "slow writer", slow(synthetic, 2 * SIZES[0])))
        peaks.append(note(report, "paused writer", paused(synthetic, 5 * SIZES[0])))
    report.check("most of all, MiB", max(peaks), most=MOST_MIB)
    report.check("most of all, over that of a million rows", max(peaks) / peaks[0], most=MOST_MORE)
    report.save(lambda figure: draw(report, figure))


def note(report: Report, case: str, measured: Measured) -> float:
    # No seconds: those of a service that has yet to import, and a writer that waits, tell nothing.
    peak = measured.peak_bytes / MIB
    report.add(case=case, rows=measured.rows, peak_mib=peak)
    return peak


def run(synthetic: Synthetic, rows: int) -> Measured:
    with service(synthetic, memory_limit_bytes=MOST_MIB * MIB, **TWO_CORES) as running:
        return running.predict(models.LINEAR, rows)


def slow(synthetic: Synthetic, rows: int) -> Measured:
    synthetic.set(append_bandwidth=SLOW)
    try:
        return run(synthetic, rows)
    finally:
        synthetic.set(append_bandwidth=0)


def paused(synthetic: Synthetic, rows: int) -> Measured:
    """The run stands still in its middle, until nothing has moved for a while."""
    synthetic.anew()
    synthetic.set(pause_after=rows // 2)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(run, synthetic, rows)
        try:
            wait_until_still(synthetic, done)
        finally:
            synthetic.set(paused=False, pause_after=0)
        return done.result()


def wait_until_still(synthetic: Synthetic, run: Future[Measured]) -> None:
    seen, since = -1, time.monotonic()
    while not run.done():
        counted = synthetic.counted()
        if not counted.rows_appended or counted.bytes_read != seen:
            seen, since = counted.bytes_read, time.monotonic()
        elif time.monotonic() - since > _STILL_SECONDS:
            return
        time.sleep(_LOOK_SECONDS)
    raise RuntimeError(f"it was over before it stood still: {run.result()}")


def draw(report: Report, figure: Figure) -> None:
    values = {"peak": [row["peak_mib"] for row in report.rows]}
    cases = [row["case"].replace(" ", "\n", 1) for row in report.rows]
    axes = bars(figure, cases, values, "MiB")
    axes.axhline(MOST_MIB, color="#6b6b6b", linestyle=":")
    axes.annotate(
        "Cloud Run's default instance",
        (0, MOST_MIB),
        (0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    axes.set_title("The most memory the service holds")


if __name__ == "__main__":
    main()
