"""How close a run comes to what this machine allows.

    python -m benchmarks.limits [--quick]

A run end to end, by the service over HTTP, beside its three parts alone (`benchmarks.parts`). No
run is faster than its slowest part, nor than the CPU seconds that its parts take, those of the
service and of the server together, spread over all cores. The limit is the larger of the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import models
from benchmarks.harness import Measured, Report, arguments, bars, service
from benchmarks.models import Kind
from benchmarks.parts import PARTS, Part, alone
from benchmarks.storage_server import Synthetic, synthetic_servers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 0.85
ROWS = {models.LINEAR: 10_000_000, models.BOOSTING: 10_000_000, models.FOREST: 2_000_000}
QUICKLY = 20


def main() -> None:
    options = arguments(__doc__)
    report = Report("limits", "End to end, beside its parts alone", options.quick)
    with synthetic_servers() as synthetic:
        models.publish(synthetic.servers.settings(), *ROWS)
        for kind, rows in ROWS.items():
            measure(report, synthetic, kind, rows // QUICKLY if options.quick else rows)
    report.notes.append(
        "The limit is the larger of the slowest part alone and of the CPU bound: the CPU seconds "
        "of the parts, with the server's, over the cores. End to end has its own beside it."
    )
    report.save(lambda figure: draw(report, figure))


def measure(report: Report, synthetic: Synthetic, kind: Kind, rows: int) -> None:
    parts = {part: alone(synthetic, part, kind, rows) for part in PARTS}
    with service(synthetic) as running:
        running.warm_up(kind)
        whole = running.predict(kind, rows)
    note(report, kind, whole, parts)


def note(report: Report, kind: Kind, whole: Measured, parts: dict[str, Part]) -> None:
    cores = report.machine["cores"]
    by_cpu = sum(part.all_cpu_seconds for part in parts.values()) / cores
    limit = max(by_cpu, *(part.seconds for part in parts.values()))
    report.add(
        model=kind.name,
        rows=whole.rows,
        rows_per_second=whole.rate,
        end_to_end_s=whole.seconds,
        read_s=parts["read"].seconds,
        predict_s=parts["predict"].seconds,
        append_s=parts["append"].seconds,
        cpu_bound_s=by_cpu,
        end_to_end_cpu_s=(whole.cpu_seconds + whole.server_cpu_seconds) / cores,
        limit_s=limit,
        of_the_limit=limit / whole.seconds,
    )
    report.check(f"{kind.title}: share of the limit", limit / whole.seconds, least=WANTED)


def draw(report: Report, figure: Figure) -> None:
    columns = {
        "read alone": "read_s",
        "predict alone": "predict_s",
        "append alone": "append_s",
        "limit": "limit_s",
        "end to end": "end_to_end_s",
    }
    values = {
        title: [1e6 * row[column] / row["rows"] for row in report.rows]
        for title, column in columns.items()
    }
    axes = bars(figure, [row["model"] for row in report.rows], values, "µs a row, log scale")
    axes.set_yscale("log")
    axes.set_title("End to end, beside its parts alone (less is faster)")


if __name__ == "__main__":
    main()
