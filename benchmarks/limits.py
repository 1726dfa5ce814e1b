"""How close a run comes to what this machine allows.

    python -m benchmarks.limits [--quick]

A run end to end, by the service over HTTP, beside its three parts alone (`benchmarks.parts`). No
run is faster than its slowest part, nor than the CPU seconds that its parts take, those of the
service and of the server together, spread over all cores. The limit is the larger of the two.

Half of each part is measured before the run and half after it: a machine that others use too
changes its speed from one minute to the next. Of several rounds the median one counts; what comes
after one comes before the next.

The limit takes it that parts at once cost no more than one after the other. They do where they
compete for caches, memory and the interpreter, and a linear model's do little else. So it is also
told what its parts take at once, in one process as in a run, each with its rows in memory and none
waiting for another: what a run takes beyond that is its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import models
from benchmarks.harness import Measured, Report, arguments, bars, service, shown
from benchmarks.models import Kind
from benchmarks.parts import AT_ONCE, PARTS, Part, alone
from benchmarks.storage_server import Synthetic, synthetic_servers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 0.85
ROWS = {models.LINEAR: 10_000_000, models.BOOSTING: 10_000_000, models.FOREST: 2_000_000}
# A linear run takes a second or two.
ROUNDS = {models.LINEAR: 5}
QUICKLY = 20


def main() -> None:
    options = arguments(__doc__)
    report = Report("limits", "End to end, beside its parts alone", options.quick)
    with synthetic_servers() as synthetic:
        models.publish(synthetic.servers.settings(), *ROWS)
        for kind, rows in ROWS.items():
            measure(report, synthetic, kind, rows // QUICKLY if options.quick else rows)
    report.notes.append(
        "By CPU: CPU seconds, with the server's, over the cores; of the parts, and of a run. "
        "The limit is the larger of the slowest part alone and of what the parts take by CPU."
    )
    report.save(lambda figure: draw(report, figure))


@dataclass(frozen=True)
class Round:
    """A run end to end, its parts alone and, of a linear model, at once; on so many `cores`."""

    whole: Measured
    parts: dict[str, Part]
    at_once: Part | None
    cores: int

    @property
    def by_cpu(self) -> float:
        return sum(part.all_cpu_seconds for part in self.parts.values()) / self.cores

    @property
    def limit(self) -> float:
        return max(self.by_cpu, *(part.seconds for part in self.parts.values()))

    @property
    def share(self) -> float:
        return self.limit / self.whole.seconds


def measure(report: Report, synthetic: Synthetic, kind: Kind, rows: int) -> None:
    rounds = sorted(all_rounds(report, synthetic, kind, rows), key=lambda each: each.share)
    note(report, kind, rounds[len(rounds) // 2])
    if len(rounds) > 1:
        shares = ", ".join(shown(each.share) for each in rounds)
        report.notes.append(f"{kind.title}, all rounds: {shares} of the limit.")
    if at_once := [each for each in rounds if each.at_once is not None]:
        note_at_once(report, kind, at_once)


def all_rounds(report: Report, synthetic: Synthetic, kind: Kind, rows: int) -> Iterator[Round]:
    half = rows // 2
    measured = [*PARTS, AT_ONCE] if kind is models.LINEAR else PARTS
    before = alone(synthetic, kind, half, measured)
    for _ in range(ROUNDS.get(kind, 1)):
        with service(synthetic) as running:
            running.warm_up(kind)
            whole = running.predict(kind, 2 * half)
        after = alone(synthetic, kind, half, measured)
        parts = {part: before[part] + after[part] for part in measured}
        at_once = parts.pop(AT_ONCE, None)
        yield Round(whole, parts, at_once, report.machine["cores"])
        before = after


def note(report: Report, kind: Kind, one: Round) -> None:
    report.add(
        model=kind.name,
        rows=one.whole.rows,
        rows_per_second=one.whole.rate,
        end_to_end_s=one.whole.seconds,
        read_s=one.parts["read"].seconds,
        predict_s=one.parts["predict"].seconds,
        append_s=one.parts["append"].seconds,
        by_cpu_s=one.by_cpu,
        end_to_end_by_cpu_s=(one.whole.cpu_seconds + one.whole.server_cpu_seconds) / one.cores,
        limit_s=one.limit,
        of_the_limit=one.share,
    )
    report.check(f"{kind.title}: share of the limit", one.share, least=WANTED)


def note_at_once(report: Report, kind: Kind, rounds: Sequence[Round]) -> None:
    told = [(each.at_once.seconds, each.limit, each.whole.seconds) for each in rounds]
    at_once, limit, whole = map(statistics.median, zip(*told, strict=True))
    report.notes.append(
        f"{kind.title}, medians of all rounds: a run takes {shown(whole)} s. "
        f"Its parts at once, none waiting for another, take {shown(at_once)} s: "
        f"{shown(limit / at_once)} of the limit. A run is {shown(at_once / whole)} times as fast."
    )


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
