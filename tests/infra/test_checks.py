"""Every check catches a fault: faults are planted in a copy of the project, and `make` is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.infra.support import ROOT, uv

TERRAFORM_TOOLS = ROOT.parent / "shared/tools/terraform"
MODULE = "infra/modules/mlsys"

Plant = Callable[[Path], None]


def write(path: str, text: str) -> Plant:
    """A new file."""

    def plant(tree: Path) -> None:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(text.encode())

    return plant


def replace(path: str, old: str, new: str) -> Plant:
    """A change to a file; `old` is a regular expression."""

    def plant(tree: Path) -> None:
        before = (tree / path).read_text()
        after = re.sub(old, new, before, count=1, flags=re.M)
        assert after != before, f"{old} is not in {path}"
        (tree / path).write_text(after)

    return plant


def append(path: str, text: str) -> Plant:
    """More at the end of a file."""
    return replace(path, r"\Z", text)


def link(path: str, target: str) -> Plant:
    """A symbolic link."""
    return lambda tree: (tree / path).symlink_to(target)


def notebook(path: str, source: str, **metadata: str) -> Plant:
    """A notebook with one cell."""
    cell = {"cell_type": "code", "execution_count": 7, "id": "a", "metadata": {}, "outputs": []}
    content = {"cells": [cell | {"source": source}], "metadata": metadata}
    return write(path, json.dumps(content | {"nbformat": 4, "nbformat_minor": 5}) + "\n")


WORKFLOW = """\
name: planted
on: pull_request
permissions: {}
jobs:
  planted:
    runs-on: ubuntu-24.04
    steps:
"""
KEY = "AKIA" + "QUWERTZUIOPASDFG"

# What is planted, and what the check says to it.
FAULTS: dict[str, tuple[Plant, str]] = {
    "ruff": (write("mlsys/samples/unused.py", "import os\n"), r"F401.*`os` imported but unused"),
    "ruff-format": (
        write("benchmarks/ugly.py", "x  =  1\n"),
        r"would be reformatted\s+--> benchmarks/ugly.py",
    ),
    "import-linter": (
        append("mlsys/names.py", "import service\n"),
        r"mlsys is not allowed to import",
    ),
    "trailing-whitespace": (write("a.md", "a \n"), r"Fixing a\.md"),
    "end-of-file": (write("b.md", "b"), r"Fixing b\.md"),
    "line-endings": (write("c.md", "c\r\nc\n"), r"c\.md: fixed mixed line endings"),
    "large-files": (write("d.bin", "d" * 2**21), r"d\.bin \(\d+ KB\) exceeds 1024 KB"),
    "merge-conflicts": (write("e.md", "<<<<<<< e\n"), r"e\.md:1: Merge conflict string"),
    "symlinks": (link("f.link", "nowhere"), r"f\.link: Broken symlink"),
    "yaml": (write("g.yaml", "g: [\n"), r'in "g\.yaml"'),
    "toml": (write("h.toml", "h =\n"), r"h\.toml: "),
    "json": (write("i.json", "{\n"), r"i\.json: Failed to json decode"),
    "secrets": (write("j.py", f'key = "{KEY}"\n'), r"AWS Access Key[\s\S]+j\.py:1"),
    "notebook-metadata": (notebook("k.ipynb", "1"), r"notebooks without metadata\.+Failed"),
    "notebook-ruff": (notebook("l.ipynb", "import os"), r"F401[\s\S]{0,80}l\.ipynb"),
    "workflow-schema": (
        write(".github/workflows/m.yml", f"{WORKFLOW}      - run: echo\n    steppes: 1\n"),
        r"m\.yml::.*(steppes|jobs)",
    ),
    "action-schema": (
        replace(".github/actions/google/action.yml", "using: composite", "using: composed"),
        r"action\.yml::.*(composed|runs)",
    ),
    "actionlint": (
        replace(".github/workflows/staging.yml", "promote_from:", "promoted_from:"),
        r'input "promoted_from" is not defined',
    ),
    "zizmor-injection": (
        write(
            ".github/workflows/n.yml",
            f"{WORKFLOW}      - run: echo ${{{{ github.event.pull_request.title }}}}\n",
        ),
        r"template-injection",
    ),
    "zizmor-pins": (
        write(".github/workflows/o.yml", f"{WORKFLOW}      - uses: actions/setup-go@v6\n"),
        r"unpinned-uses",
    ),
    "hadolint-user": (replace("Dockerfile", "^USER .*", "USER root"), r"DL3002"),
    "hadolint-tag": (replace("Dockerfile", "^FROM python:.*", "FROM python"), r"DL3006"),
    "renovate": (
        replace("renovate.json", '"extends": .*', '"extends": 7,'),
        r"renovate\.json::.*extends",
    ),
    "terraform-format": (
        append(f"{MODULE}/main.tf", "locals {\n  a   = 1\n}\n"),
        r"-  a   = 1",
    ),
    "terraform-static": (
        replace(f"{MODULE}/models.tf", "uniform_bucket_level_access = true", "uniform = true"),
        r"unsupported argument or block uniform",
    ),
    "terraform-validate": (
        replace(
            f"{MODULE}/outputs.tf",
            "google_cloud_run_v2_job.predict",
            "google_cloud_run_v2_job.lost",
        ),
        r"Reference to undeclared resource",
    ),
}

# Well formed, and wrong: only the tests of the plan can tell.
INSECURE: dict[str, tuple[Plant, str]] = {
    "everyone-may-call": (
        replace(f"{MODULE}/service.tf", "member   = each.value$", 'member   = "allUsers"'),
        r"Everyone, a whole domain or every editor",
    ),
    "everyone-may-be-let-in": (
        replace(f"{MODULE}/variables.tf", r"\(user\|group\|serviceAccount\):\[\^@\\\\s\]\+@", ".*"),
        r"anonymous_invokers_are_refused\"... fail",
    ),
    "no-versions": (
        replace(f"{MODULE}/models.tf", "enabled = true", "enabled = false"),
        r"A bucket is not versioned",
    ),
    "an-editor": (
        replace(f"{MODULE}/identity.tf", "roles/bigquery.jobUser", "roles/editor"),
        r"The runtime account has another role",
    ),
    "any-repository": (
        replace(f"{MODULE}/github.tf", "assertion.repository_id == ", "assertion.repository != "),
        r"Other repositories get a token",
    ),
    "any-branch": (
        replace(f"{MODULE}/github.tf", r"assertion\.ref == '\$\{var\.github\.ref\}' && ", ""),
        r"Another branch, or a job outside",
    ),
    "prod-unprotected": (
        replace(
            "infra/envs/prod/main.tf", "promotes_from =", "protected = false\n  promotes_from ="
        ),
        r'prod_is_prod"\.\.\. fail',
    ),
}


def tree_with(place: Path, faults: dict[str, tuple[Plant, str]]) -> Path:
    """A copy of what Git tracks here, in a repository of its own, with the faults in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for path in listed.stdout.split("\0")[:-1]:
        if (ROOT / path).exists():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, place / path, follow_symlinks=False)
    for plant, _ in faults.values():
        plant(place)
    for arguments in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *arguments], cwd=place, check=True)
    return place


def make(tree: Path, *arguments: str) -> str:
    """What `make` says, with the environment that is installed here."""
    # `make test` leaves its own flags and level behind.
    outside = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(
        ["make", "--old-file=setup", f"UV={uv()}", *arguments],
        cwd=tree,
        env=outside | {"UV_PROJECT_ENVIRONMENT": sys.prefix},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `make lint` says of all faults at once."""
    tree = tree_with(tmp_path_factory.mktemp("faults"), FAULTS)
    return make(tree, "--ignore-errors", "lint")


@pytest.mark.parametrize("fault", [each for each in FAULTS if not each.startswith("terraform")])
def test_lint_catches(told: str, fault: str) -> None:
    assert re.search(FAULTS[fault][1], told), told


def test_every_command_of_lint_has_failed(told: str) -> None:
    commands = make(ROOT, "--dry-run", "lint").splitlines()
    # The lock file is well: to break it would break every other command too.
    assert told.count("(ignored)") == len(commands) - 1, told


@pytest.fixture(scope="module")
def told_of_terraform(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `make terraform` says, of a module that is malformed and of one that is insecure."""
    if not TERRAFORM_TOOLS.exists():
        pytest.skip("the stand-in for Terraform's registry is not here")
    malformed = {name: FAULTS[name] for name in FAULTS if name.startswith("terraform")}
    trees = (tree_with(tmp_path_factory.mktemp("faults"), each) for each in (malformed, INSECURE))
    options = ["--ignore-errors", f"TERRAFORM_TOOLS={TERRAFORM_TOOLS}"]
    return make(next(trees), *options, "terraform", f"TERRAFORM_ROOTS={MODULE}") + make(
        next(trees), *options, "terraform-test", f"TERRAFORM_ROOTS={MODULE} infra/envs/prod"
    )


@pytest.mark.parametrize(
    "fault", [*(each for each in FAULTS if each.startswith("terraform")), *INSECURE]
)
def test_terraform_catches(told_of_terraform: str, fault: str) -> None:
    assert re.search((FAULTS | INSECURE)[fault][1], told_of_terraform), told_of_terraform


def test_every_grant_is_among_those_that_the_plan_is_asked_about() -> None:
    asked = (ROOT / MODULE / "tests/security.tftest.hcl").read_text()
    granted = {
        ".".join(found)
        for path in (ROOT / MODULE).glob("*.tf")
        for found in re.findall(r'^resource "(google_\w+_iam_\w+)" "(\w+)"', path.read_text(), re.M)
    }

    assert len(granted) > 10
    assert {each for each in granted if not re.search(rf"{re.escape(each)}\b", asked)} == set()
