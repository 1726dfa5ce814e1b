"""Writes the results into README.md: tables, pictures and what was to be shown.

    python -m benchmarks.readme

What is between the marks `<!-- name -->` and `<!-- /name -->` is made of `results/name.json`. Marks
without results stay empty.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, heading, shown, told_check

README = Path(__file__).with_name("README.md")
_MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.S)
# What would be too long a table is left to the picture and the JSON.
_MOST_ROWS = 30


def main() -> None:
    README.write_text(filled(README.read_text(), RESULTS))


def filled(text: str, results: Path) -> str:
    """The text, with the newest results between its marks."""
    return _MARKED.sub(lambda mark: mark[1] + section(results, mark[2]) + mark[3], text)


def section(results: Path, name: str) -> str:
    file = results / f"{name}.json"
    if not file.exists():
        return ""
    told = json.loads(file.read_text())
    parts = [f"![{told['title']}](results/{name}.png)"]
    if len(told["rows"]) <= _MOST_ROWS:
        parts.append(table(told["rows"]))
    parts.append("\n".join(f"- {told_check(c)}{_verdict(c)}" for c in told["checks"]))
    parts += told["notes"]
    parts.append(f"Measured on {machine(told)}.")
    return "\n" + "".join(f"{part}\n\n" for part in parts if part)


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    numbers = [isinstance(rows[0][name], (int, float)) for name in names]
    lines = [
        [heading(name) for name in names],
        ["---:" if number else "---" for number in numbers],
        *([shown(row[name]) for name in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(check: dict[str, Any]) -> str:
    return "" if check["good"] else ", **not reached**"


def machine(told: dict[str, Any]) -> str:
    on = told["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in on["packages"].items())
    return (
        f"{on['cores']} cores of {on['cpu']}, {shown(on['memory_gib'])} GiB, {on['system']}, "
        f"Python {on['python']}, {packages}, on {told['measured']}; load before: "
        f"{on['load_before']}"
    )


if __name__ == "__main__":
    main()
