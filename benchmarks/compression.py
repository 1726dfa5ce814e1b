"""Whether rows should come compressed (`READ_COMPRESSION`), by the speed of the network.

    python -m benchmarks.compression [--quick]

Reading alone (see `benchmarks.parts`), with messages as they are, in LZ4 and in ZSTD, from a server
that sends as fast as it can, and from one that sends no more than so many bytes a second. It has
them compressed beforehand: the server's part of the work counts for nothing here. Of the numeric
table the random floats hardly get smaller and the integers do; the mixed one has few words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import models
from benchmarks.harness import Report, arguments
from benchmarks.parts import CODECS, Part, alone
from benchmarks.storage_server import synthetic_servers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 1_000_000
LOOPBACK_ROWS = 10 * ROWS
KINDS = {"numeric": models.LINEAR, "mixed": models.STRINGS}
# Bytes a second: all that loopback gives, and 1 and 0.3 Gbit/s.
NETWORKS = {"loopback": 0, "125 MB/s": 125e6, "40 MB/s": 40e6}


def main() -> None:
    options = arguments(__doc__)
    report = Report("compression", "Reading compressed rows", options.quick)
    with synthetic_servers() as synthetic:
        models.publish(synthetic.servers.settings(), *KINDS.values())
        for network, bandwidth in NETWORKS.items():
            synthetic.set(read_bandwidth=bandwidth)
            rows = (ROWS if bandwidth else LOOPBACK_ROWS) // (10 if options.quick else 1)
            for table in KINDS:
                parts = alone(synthetic, KINDS[table], rows, [f"read:{codec}" for codec in CODECS])
                for codec, part in zip(CODECS, parts.values(), strict=True):
                    note(report, network, table, codec, part)
    report.save(lambda figure: draw(report, figure))


def note(report: Report, network: str, table: str, codec: str, part: Part) -> None:
    report.add(
        network=network,
        table=table,
        codec=codec,
        rows_per_second=part.rows / part.seconds,
        bytes_per_row=part.bytes_read / part.rows,
        service_cpu_us_per_row=1e6 * part.cpu_seconds / part.rows,
    )


def draw(report: Report, figure: Figure) -> None:
    for place, table in enumerate(KINDS):
        axes = figure.add_subplot(1, len(KINDS), place + 1)
        for codec in CODECS:
            rates = [
                row["rows_per_second"]
                for row in report.rows
                if (row["table"], row["codec"]) == (table, codec)
            ]
            axes.plot(list(NETWORKS), rates, marker="o", label=codec)
        axes.set(title=f"{table} table", yscale="log")
        if not place:
            axes.set_ylabel("rows a second, log scale")
            axes.legend()


if __name__ == "__main__":
    main()
