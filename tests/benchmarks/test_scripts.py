"""The scripts that measure: what they are made of is still there, and what they count is right."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import models, parts
from benchmarks.harness import service
from benchmarks.parts import AT_ONCE, PARTS, alone
from benchmarks.storage_server import ROOT, synthetic_servers

# In an environment of its own: see the script.
OF_THE_PEERS = "contestants"
SCRIPTS = sorted({path.stem for path in Path(ROOT, "benchmarks").glob("*.py")} - {OF_THE_PEERS})


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_finds_all_it_needs(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_parts_alone_and_a_run_end_to_end_are_of_the_same_rows() -> None:
    rows, compressed = 40_000, f"read:{parts.CODECS[-1]}"
    with synthetic_servers() as synthetic:
        models.publish(synthetic.servers.settings(), models.LINEAR)
        found = alone(synthetic, models.LINEAR, rows, [*PARTS, AT_ONCE, compressed])
        with service(synthetic, read_compression="zstd") as running:
            whole = running.predict(models.LINEAR, rows)
        read_by_service = synthetic.counted().bytes_read

    assert {part.rows for part in found.values()} == {whole.rows} == {rows}
    assert all(part.seconds > 0 and part.cpu_seconds > 0 for part in found.values())
    reads = {name: part.bytes_read for name, part in found.items()}
    assert reads["predict"] == reads["append"] == 0
    assert reads[AT_ONCE] == reads["read"] > 80 * rows > reads[compressed] == read_by_service
