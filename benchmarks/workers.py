"""A model that is bound by the interpreter: threads of one process beside what the service chooses.

    python -m benchmarks.workers [--quick]

A text vectorizer is Python from end to end, and threads of one process take turns at that. Unless
it is told not to, the service finds that out and predicts in several processes. What it chooses is
held against the faster of two ways to have one process: a thread a core, and one thread. How many
read streams there are, and how rows are shared out to them, should make no difference. The linear
model is there to see that others are left as they are.

Measured are later runs of a service than the first, as that one has to start what processes are
forked from. The cases take turns, in several rounds; the ratio of a round is of runs that followed
each other, and the median one counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks import models
from benchmarks.harness import Measured, Report, arguments, bars, service, shown
from benchmarks.models import Kind
from benchmarks.storage_server import Synthetic, synthetic_servers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 1.8
ROWS = 1_500_000
ROUNDS = 3
# So many that processes pay on a quick machine as well.
FIRST_ROWS = 1_000_000
# A case: the settings of its service, and which part of the rows the first read stream has.
CHOSEN = "as the service chooses"
CASES = {
    "one process, one thread": ({"worker_processes": 0, "predict_threads": 1}, 0),
    "one process": ({"worker_processes": 0}, 0),
    CHOSEN: ({}, 0),
    "the same, one read stream": ({"read_streams": 1}, 0),
    "the same, nine of ten rows in one": ({}, 0.9),
}
_ALONE, _OTHERS = list(CASES)[:2], list(CASES)[3:]


def main() -> None:
    options = arguments(__doc__)
    report = Report("workers", "A model that is bound by the interpreter", options.quick)
    rows = ROWS // 10 if options.quick else ROWS
    with synthetic_servers() as synthetic:
        rounds = measure(report, synthetic, models.TEXT, rows)
        measure(report, synthetic, models.LINEAR, 5 * rows)
    over_one = [each[CHOSEN].rate / max(each[case].rate for case in _ALONE) for each in rounds]
    others = [min(each[case].rate for case in _OTHERS) / each[CHOSEN].rate for each in rounds]
    what = f"{models.TEXT.title}: as chosen, over one process"
    report.check(what, statistics.median(over_one), least=WANTED)
    report.check("other read streams, over the same", statistics.median(others), least=0.9)
    report.notes.append(
        f"Medians of {ROUNDS} rounds by turns. As chosen, over one process, in each: "
        f"{', '.join(map(shown, sorted(over_one)))}."
    )
    report.save(lambda figure: draw(report, figure))


def measure(
    report: Report, synthetic: Synthetic, kind: Kind, rows: int
) -> Sequence[dict[str, Measured]]:
    """Notes the median run of each case, and returns the runs of every round by their case."""
    models.publish(synthetic.servers.settings(), kind)
    with ExitStack() as stack:
        services = {}
        for case, (settings, _) in CASES.items():
            running = services[case] = stack.enter_context(service(synthetic, **settings))
            running.warm_up(kind)
            if case not in _ALONE:
                running.predict(kind, min(FIRST_ROWS, rows))
        rounds = []
        for _ in range(ROUNDS):
            runs = {}
            for case, (_, first_share) in CASES.items():
                synthetic.set(first_share=first_share)
                runs[case] = services[case].predict(kind, rows)
            synthetic.set(first_share=0)
            rounds.append(runs)
    for case in CASES:
        by_seconds = sorted((runs[case] for runs in rounds), key=lambda run: run.seconds)
        report.add(model=kind.title, case=case, **by_seconds[ROUNDS // 2].told())
    return rounds


def draw(report: Report, figure: Figure) -> None:
    rows = report.rows[: len(CASES)]
    values = {"rate": [row["rows_per_second"] for row in rows]}
    axes = bars(figure, [row["case"] for row in rows], values, "rows a second")
    axes.set_title(f"{models.TEXT.title.capitalize()} (more is faster)")


if __name__ == "__main__":
    main()
