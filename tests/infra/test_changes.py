"""What a change triggers: asked of the script as the workflow asks it, in real repositories."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".github/scripts/changes.py"
EVERYTHING = {"deploy", "infra", "tests"}


class Repository:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit("README.md", "mlsys/old.py")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "core.hooksPath="]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=self.place, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, *paths: str) -> None:
        for path in paths:
            (self.place / path).parent.mkdir(parents=True, exist_ok=True)
            (self.place / path).write_text(f"{path} once more\n" * 20)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=change", "--no-gpg-sign")

    def touched(self, base: str, head: str = "HEAD") -> set[str]:
        command = [sys.executable, SCRIPT, base, head]
        done = subprocess.run(command, cwd=self.place, check=True, capture_output=True, text=True)
        outputs = dict(line.split("=") for line in done.stdout.splitlines())
        assert set(outputs) == EVERYTHING
        assert set(outputs.values()) <= {"true", "false"}
        return {part for part, value in outputs.items() if value == "true"}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("mlsys/read.py", {"deploy", "tests"}),
        ("service/samples/deep/down.csv", {"deploy", "tests"}),
        ("pyproject.toml", {"deploy", "tests"}),
        ("uv.lock", {"deploy", "tests"}),
        ("Dockerfile", {"deploy", "tests"}),
        (".dockerignore", {"deploy", "tests"}),
        ("service/registry_schema.json", EVERYTHING),
        ("infra/modules/mlsys/service.tf", {"infra", "tests"}),
        ("infra/envs/prod/main.tf", {"infra"}),
        (".terraform-version", {"infra", "tests"}),
        ("infra/README.md", set()),
        ("notebooks/README.md", set()),
        ("LICENSE", set()),
        ("tests/test_flow.py", {"tests"}),
        ("notebooks/titanic-survival-example.ipynb", {"tests"}),
        (".github/workflows/pr.yml", {"tests"}),
        ("Makefile", {"tests"}),
        ("a-file-nobody-thought-of", {"tests"}),
        # Alike, and something else.
        ("docs/mlsys/read.py", {"tests"}),
        ("Dockerfile.old", {"tests"}),
        ("mlsys\nREADME.md", set()),
        ("mlsys/ümlaut und Leerzeichen.py", {"deploy", "tests"}),
    ],
)
def test_a_path_triggers_what_it_belongs_to(
    repository: Repository, path: str, parts: set[str]
) -> None:
    repository.commit(path)

    assert repository.touched("HEAD~") == parts


def test_all_commits_of_a_range_count(repository: Repository) -> None:
    repository.commit("service/app.py")
    repository.commit("CHANGELOG.md")

    assert repository.touched("HEAD~") == set()
    assert repository.touched("HEAD~2") == {"deploy", "tests"}


def test_what_was_deleted_or_moved_away_counts(repository: Repository) -> None:
    repository.git("mv", "mlsys/old.py", "notes.md")
    repository.git("commit", "--quiet", "--message=move", "--no-gpg-sign")

    assert repository.touched("HEAD~") == {"deploy", "tests"}


def test_what_happened_on_main_meanwhile_does_not_count(repository: Repository) -> None:
    repository.git("checkout", "--quiet", "-b", "topic")
    repository.commit("infra/main.tf")
    repository.git("checkout", "--quiet", "main")
    repository.commit("service/app.py")

    assert repository.touched("main", "topic") == {"infra", "tests"}


@pytest.mark.parametrize("base", ["0" * 40, "", "f" * 40])
def test_everything_has_changed_where_the_base_is_unknown(
    repository: Repository, base: str
) -> None:
    assert repository.touched(base) == EVERYTHING
