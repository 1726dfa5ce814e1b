"""What a benchmark has measured is told as it was, on the screen, in files and in the guide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Report, bars
from benchmarks.readme import README, filled


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    report = Report("speed", "How fast it is")
    report.add(model="linear", rows=1_000_000, rows_per_second=123_456.7, share=0.91234)
    report.add(model="forest", rows=20_000, rows_per_second=31.4, share=None)
    report.check("share of the limit", 0.91234, least=0.85)
    report.check("memory, MiB", 600.0, most=512)
    report.save(
        lambda figure: bars(figure, ["linear", "forest"], {"rate": [123_456.7, 31.4]}, "rows")
    )
    return report


def test_results_are_kept_as_json_and_as_a_picture(report: Report, tmp_path: Path) -> None:
    told = json.loads((tmp_path / "speed.json").read_text())

    assert [row["rows"] for row in told["rows"]] == [1_000_000, 20_000]
    assert told["rows"][0]["rows_per_second"] == 123_500
    assert [check["good"] for check in told["checks"]] == [True, False]
    assert told["machine"]["cores"] >= 1
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_printed(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.save(lambda figure: None)
    printed = capsys.readouterr().out

    for words in ("1,000,000", "123,457", "0.912", "—", "memory, MiB: 600 (at most 512)"):
        assert words in printed


def test_a_small_version_leaves_the_results_alone(report: Report, tmp_path: Path) -> None:
    before = (tmp_path / "speed.json").read_text()
    report.quick = True
    report.rows.pop()
    report.save(lambda figure: None)

    assert (tmp_path / "speed.json").read_text() == before
    assert len(json.loads((tmp_path / "quick" / "speed.json").read_text())["rows"]) == 1


def test_the_guide_is_filled_between_its_marks(report: Report, tmp_path: Path) -> None:
    text = "Before.\n\n<!-- speed -->\nold\n<!-- /speed -->\n\n<!-- other -->\n<!-- /other -->\n"
    once = filled(text, tmp_path)

    assert "| linear | 1,000,000 | 123,500 | 0.912 |" in once
    assert "- memory, MiB: 600 (at most 512), **not reached**" in once
    assert "old" not in once
    assert once.startswith("Before.\n")
    assert once.endswith("<!-- other -->\n<!-- /other -->\n")
    assert filled(once, tmp_path) == once


def test_the_guide_has_a_place_for_each_benchmark_of_make() -> None:
    makefile = README.parents[1].joinpath("Makefile").read_text()
    [names] = [
        line.partition("?=")[2].split()
        for line in makefile.splitlines()
        if line.startswith("BENCHMARKS")
    ]
    for name in names:
        assert f"<!-- {name} -->" in README.read_text()
        assert README.with_name(f"{name}.py").exists()
