"""A model that is bound by the interpreter: threads of one process beside what the service chooses.

    python -m benchmarks.workers [--quick]

A text vectorizer is Python from end to end, and threads of one process take turns at that. Unless
it is told not to, the service finds that out and predicts in several processes. What it chooses is
held against the faster of two ways to have one process: a thread a core, and one thread. How many
read streams there are should make no difference. The linear model is there to see that others are
left as they are. Measured is a later run of a service than the first, as that one has to start what
processes are forked from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import models
from benchmarks.harness import Report, arguments, bars, service
from benchmarks.storage_server import synthetic_servers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 1.8
ROWS = 1_500_000
# So many that processes pay on a quick machine as well.
FIRST_ROWS = 1_000_000
CHOSEN, ONE_STREAM = "as the service chooses", "the same, one read stream"
CASES = {
    "one process, one thread": {"worker_processes": 0, "predict_threads": 1},
    "one process": {"worker_processes": 0},
    CHOSEN: {},
    ONE_STREAM: {"read_streams": 1},
}


def main() -> None:
    options = arguments(__doc__)
    report = Report("workers", "A model that is bound by the interpreter", options.quick)
    rows = ROWS // 10 if options.quick else ROWS
    with synthetic_servers() as synthetic:
        for kind in (models.TEXT, models.LINEAR):
            many = rows if kind is models.TEXT else 5 * rows
            models.publish(synthetic.servers.settings(), kind)
            for case, settings in CASES.items():
                with service(synthetic, **settings) as running:
                    running.warm_up(kind)
                    if case in (CHOSEN, ONE_STREAM):
                        running.predict(kind, min(FIRST_ROWS, many))
                    measured = running.predict(kind, many)
                report.add(model=kind.title, case=case, **measured.told())
    *alone, chosen, one_stream = (row["rows_per_second"] for row in report.rows[: len(CASES)])
    what = "text vectorizer: as chosen, over one process"
    report.check(what, chosen / max(alone), least=WANTED)
    report.check("one read stream, over as many as cores", one_stream / chosen, least=0.9)
    report.save(lambda figure: draw(report, figure))


def draw(report: Report, figure: Figure) -> None:
    rows = report.rows[: len(CASES)]
    values = {"rate": [row["rows_per_second"] for row in rows]}
    axes = bars(figure, [row["case"] for row in rows], values, "rows a second")
    axes.set_title(f"{models.TEXT.title.capitalize()} (more is faster)")


if __name__ == "__main__":
    main()
