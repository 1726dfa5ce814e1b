"""Settings: where they come from, and what they may be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlsys.names import Environment
from mlsys.settings import LARGEST_APPEND, Settings

EXAMPLE = Path(__file__).parents[2] / ".env.example"


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory without `.env`, and an environment without settings."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_any_setting_the_names_are_those_of_the_project() -> None:
    settings = Settings()

    assert [settings.model_bucket(env) for env in Environment] == [
        "mlsys-models-dev",
        "mlsys-models-staging",
        "mlsys-models-prod",
    ]
    assert settings.mlsys_env is None
    assert settings.gcp_project_id is None
    assert settings.storage_emulator_host is None


def test_the_environment_goes_before_the_file(
    empty_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pragma: allowlist nextline secret
    (empty_place / ".env").write_text("GCP_PROJECT_ID=of-the-file\nCHUNK_ROWS=7\n")
    monkeypatch.setenv("GCP_PROJECT_ID", "of-the-environment")
    settings = Settings()

    assert settings.gcp_project_id == "of-the-environment"
    assert settings.chunk_rows == 7


def test_an_empty_setting_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLSYS_ENV", "")
    monkeypatch.setenv("READ_STREAMS", "")
    settings = Settings()

    assert settings.mlsys_env is None
    assert settings.read_streams >= 2


def test_settings_of_other_programs_are_none_of_ours(empty_place: Path) -> None:
    (empty_place / ".env").write_text("SOMETHING_ELSE=1\n")

    assert not hasattr(Settings(), "something_else")


def test_each_environment_has_its_own_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCS_BUCKET_MODELS_STAGING", "elsewhere")

    assert Settings().model_bucket(Environment.STAGING) == "elsewhere"
    assert Settings().model_bucket(Environment.PROD) == "mlsys-models-prod"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLSYS_ENV", "production"),
        ("CHUNK_ROWS", "0"),
        ("CHUNK_ROWS", "-1"),
        ("CHUNK_ROWS", "many"),
        ("READ_STREAMS", "1001"),
        ("APPEND_REQUEST_BYTES", str(LARGEST_APPEND + 1)),
        ("RETRY_SECONDS", "0"),
        ("PROGRESS_SECONDS", "-0.5"),
    ],
)
def test_a_setting_that_can_not_work_is_refused_by_its_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().chunk_rows = 5


def test_the_largest_append_leaves_room_under_what_bigquery_takes() -> None:
    assert LARGEST_APPEND <= 10_000_000 - 500_000


def test_the_example_documents_each_setting_with_its_default(
    empty_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = EXAMPLE.read_text()
    named = re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", example, re.M)
    assert {name.lower() for name, _ in named} == set(Settings.model_fields)

    defaults = Settings()
    (empty_place / ".env").write_text(example)
    theirs = Settings().model_dump(exclude={"gcp_project_id"})
    assert theirs == defaults.model_dump(exclude={"gcp_project_id"})
