"""A model that is bound by the interpreter: threads of one process beside what the service chooses.

    python -m benchmarks.workers [--quick]

A text vectorizer is Python from end to end, and threads of one process take turns at that. Unless
it is told not to, the service finds that out and predicts in several processes. What it chooses is
held against the faster of two ways to have one process: a thread a core, and one thread. How many
read streams there are, and how rows are shared out to them, should make no difference. The linear
model is there to see that others are left as they are. Measured is a later run of a service than
the first, as that one has to start what processes are forked from; of each case the quicker of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import models
from benchmarks.harness import Measured, Report, arguments, bars, service
from benchmarks.models import Kind
from benchmarks.storage_server import Synthetic, synthetic_servers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 1.8
ROWS = 1_500_000
RUNS = 2
# So many that processes pay on a quick machine as well.
FIRST_ROWS = 1_000_000
# A case: its settings, and how the server shares rows out.
CASES = {
    "one process, one thread": ({"worker_processes": 0, "predict_threads": 1}, {}),
    "one process": ({"worker_processes": 0}, {}),
    "as the service chooses": ({}, {}),
    "the same, one read stream": ({"read_streams": 1}, {}),
    "the same, nine of ten rows in one": ({}, {"first_share": 0.9}),
}
_ALONE = 2
_EVEN = {"first_share": 0}


def main() -> None:
    options = arguments(__doc__)
    report = Report("workers", "A model that is bound by the interpreter", options.quick)
    rows = ROWS // 10 if options.quick else ROWS
    with synthetic_servers() as synthetic:
        for kind, many in ((models.TEXT, rows), (models.LINEAR, 5 * rows)):
            models.publish(synthetic.servers.settings(), kind)
            for case, (settings, shares) in CASES.items():
                synthetic.set(**_EVEN | shares)
                measured = measure(synthetic, kind, many, settings)
                report.add(model=kind.title, case=case, **measured.told())
    rates = [row["rows_per_second"] for row in report.rows[: len(CASES)]]
    alone, (chosen, *others) = rates[:_ALONE], rates[_ALONE:]
    what = "text vectorizer: as chosen, over one process"
    report.check(what, chosen / max(alone), least=WANTED)
    report.check("other read streams, over the same", min(others) / chosen, least=0.9)
    report.save(lambda figure: draw(report, figure))


def measure(synthetic: Synthetic, kind: Kind, rows: int, settings: dict[str, Any]) -> Measured:
    """The quickest of several runs of a service, which follow each other."""
    with service(synthetic, **settings) as running:
        running.warm_up(kind)
        if "worker_processes" not in settings:
            running.predict(kind, min(FIRST_ROWS, rows))
        runs = [running.predict(kind, rows) for _ in range(RUNS)]
    return min(runs, key=lambda run: run.seconds)


def draw(report: Report, figure: Figure) -> None:
    rows = report.rows[: len(CASES)]
    values = {"rate": [row["rows_per_second"] for row in rows]}
    axes = bars(figure, [row["case"] for row in rows], values, "rows a second")
    axes.set_title(f"{models.TEXT.title.capitalize()} (more is faster)")


if __name__ == "__main__":
    main()
