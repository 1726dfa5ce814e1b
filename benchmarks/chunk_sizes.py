"""Rows a second and memory, by the rows of a predict call, the model and the read streams.

    python -m benchmarks.chunk_sizes [--quick]

A fresh service for each model and number of streams predicts with chunks of 1,000 rows, then 4
times as many, up to a million. So its peak is that of the largest chunks so far. `adaptive` is what
the service chooses by itself, which is no more than 65,536 rows of these tables: it takes its turn
before chunks of 64,000. A chunk is never larger than a stream is long: sizes beyond that are left
out. Of small chunks, as many are enough as tell what one costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import models
from benchmarks.harness import Report, arguments, service
from benchmarks.models import Kind
from benchmarks.storage_server import Synthetic, synthetic_servers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ADAPTIVE = "adaptive"
SIZES = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
_ADAPTIVE_BEFORE = 64_000
STREAMS = (1, 2)
ROWS = {
    models.LINEAR: 2**23,
    models.BOOSTING: 2**20,
    models.FOREST: 2**20,
    models.STRINGS: 2**20,
}
MOST_CHUNKS = 64
# A size that holds so much more than `adaptive` does is no match for it.
AS_MUCH = 1.05
QUICKLY = 8


def main() -> None:
    options = arguments(__doc__)
    report = Report("chunk_sizes", "By the rows of a predict call", options.quick)
    with synthetic_servers() as synthetic:
        models.publish(synthetic.servers.settings(), *ROWS)
        for kind, rows in ROWS.items():
            for streams in STREAMS:
                measure(
                    report, synthetic, kind, rows // QUICKLY if options.quick else rows, streams
                )
    for kind in ROWS:
        check(report, kind)
    report.save(lambda figure: draw(report, figure))


def measure(report: Report, synthetic: Synthetic, kind: Kind, rows: int, streams: int) -> None:
    with service(synthetic, read_streams=streams) as running:
        running.warm_up(kind)
        for size in SIZES:
            if size == _ADAPTIVE_BEFORE:
                note(report, kind, streams, ADAPTIVE, running.predict(kind, rows).told())
            if size <= rows // streams:
                told = running.predict(kind, min(rows, MOST_CHUNKS * size), chunk_rows=size).told()
                note(report, kind, streams, size, told)


def check(report: Report, kind: Kind) -> None:
    adaptive = of(report, kind, chunk_rows=ADAPTIVE)
    chosen = max(row["rows_per_second"] for row in adaptive)
    most = AS_MUCH * max(row["peak_mib"] for row in adaptive)
    best = max(row["rows_per_second"] for row in of(report, kind) if row["peak_mib"] <= most)
    what = f"{kind.title}: adaptive, over the best that holds as much memory"
    report.check(what, chosen / best, least=0.9)


def note(
    report: Report, kind: Kind, streams: int, chunk_rows: int | str, told: dict[str, Any]
) -> None:
    report.add(model=kind.name, streams=streams, chunk_rows=chunk_rows, **told)


def of(report: Report, kind: Kind, **wanted: Any) -> list[dict[str, Any]]:
    wanted["model"] = kind.name
    return [row for row in report.rows if wanted.items() <= row.items()]


def draw(report: Report, figure: Figure) -> None:
    figure.set_size_inches(7, 9)
    for place, kind in enumerate(ROWS):
        for side, column in enumerate(("rows_per_second", "peak_mib")):
            axes = figure.add_subplot(len(ROWS), 2, 2 * place + side + 1)
            _lines(axes, report, kind, column)
            axes.set_title(f"{kind.name}, " + ("peak, MiB" if side else "1,000 rows a second"))
            if not place and not side:
                axes.legend()
            if place == len(ROWS) - 1:
                axes.set_xlabel("rows of a chunk; ◆ adaptive")


def _lines(axes: Axes, report: Report, kind: Kind, column: str) -> None:
    scale = 1000 if column == "rows_per_second" else 1
    for streams in STREAMS:
        rows = of(report, kind, streams=streams)
        fixed = [row for row in rows if row["chunk_rows"] != ADAPTIVE]
        if not fixed:
            continue
        [line] = axes.plot(
            [row["chunk_rows"] for row in fixed],
            [row[column] / scale for row in fixed],
            label=f"{streams} stream" + "s" * (streams > 1),
            marker=".",
        )
        chosen = [row[column] / scale for row in rows if row["chunk_rows"] == ADAPTIVE]
        axes.plot([SIZES[0] / 3], chosen, marker="D", linestyle="", color=line.get_color())
    axes.set_xscale("log", base=4)
    axes.set_xticks(SIZES, [*(f"{size // 1000}k" for size in SIZES[:-1]), "1M"])
    axes.set_ylim(0, 1.1 * max(row[column] for row in of(report, kind)) / scale)


if __name__ == "__main__":
    main()
