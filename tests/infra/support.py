"""What the tests of the infrastructure share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]


def uv() -> str:
    """Where uv is: `uv run` says so, else it is on PATH, or where the Makefile has put it."""
    found = os.environ.get("UV") or shutil.which("uv") or shutil.which("uv", path=ROOT / ".uv/bin")
    assert found, "There is no uv. Run `make setup`."
    return found
