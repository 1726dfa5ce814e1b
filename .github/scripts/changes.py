#!/usr/bin/env python3
"""Which parts of the project a range of commits touches, as outputs of a workflow step.

    changes.py BASE HEAD >> "$GITHUB_OUTPUT"

    deploy   the image changes: build it, and deploy it to dev
    infra    what Terraform makes changes: plan it, and apply it to dev
    tests    something changes that a test could notice

Where BASE is not known here (the first push of a branch, a force push), everything has changed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable

# Where a path may matter to several parts, all of them say so.
PARTS = {
    "deploy": (
        r"mlsys/.*",
        r"service/.*",
        r"pyproject\.toml",
        r"uv\.lock",
        r"Dockerfile",
        r"\.dockerignore",
    ),
    "infra": (
        r"infra/(?!.*\.md$).*",
        # Terraform makes the registry table from it.
        r"service/registry_schema\.json",
        r"\.terraform-version",
    ),
    # Whatever is not listed as harmless: a file that nobody thought of is better tested than not.
    "tests": (r"(?!(?:.*\.md|LICENSE|renovate\.json|\.gitignore|infra/envs/.*)$).*",),
}
NOTHING = re.compile(r"0*")


def changed(base: str, head: str) -> list[str] | None:
    """Paths that differ, both names of one that was moved; None where that can't be known."""
    if NOTHING.fullmatch(base):
        return None
    # Three dots: what the branch did since it left, not what has happened beside it.
    command = ["git", "diff", "--name-only", "--no-renames", "-z", f"{base}...{head}", "--"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"Everything is taken as changed: {done.stderr.strip()}", file=sys.stderr)
        return None
    return done.stdout.split("\0")[:-1]


def touched(paths: Iterable[str] | None) -> dict[str, bool]:
    """Which parts the paths belong to."""
    if paths is None:
        return dict.fromkeys(PARTS, True)
    paths = list(paths)
    return {
        part: any(re.fullmatch(pattern, path, re.S) for pattern in patterns for path in paths)
        for part, patterns in PARTS.items()
    }


if __name__ == "__main__":
    for part, is_touched in touched(changed(*sys.argv[1:])).items():
        print(f"{part}={str(is_touched).lower()}")
