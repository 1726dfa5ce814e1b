"""Names: what is one is taken as it is, and nothing else gets past."""

from __future__ import annotations

import pytest

from mlsys.errors import InvalidRequest
from mlsys.names import (
    Environment,
    TableRef,
    artifact_path,
    check_model_name,
    check_version,
    parse_artifact_path,
    shown,
    version_number,
)

# What a quote, a path or a query could be broken out of with, and what only looks like a letter.
HOSTILE = [
    "",
    " ",
    "a b",
    "a`b",
    "`",
    "a'b",
    'a"b',
    "a;b",
    "a--b; DROP TABLE t",
    "a/b",
    "a\\b",
    "..",
    "../../etc",
    "a.",
    ".a",
    "a\n",
    "\na",
    "a\nb",
    "a\r\n",
    "a\x00",
    "\x00",
    "a\x00b",
    "a\tb",
    "a?b",
    "a#b",
    "a%2fb",
    "a*b",
    "a$b",
    "é",
    "naïve",
    "٣",
    "²",
    "\uff41",
    "模型",
    "a\u200b",
    "🚢",
    "\ud800",
    "x" * 2_000,
]

GOOD_TABLES = [
    "my-project.mlsys_dev.titanic",
    "a12345.d.t",
    "a" * 30 + ".d.t",
    "my-project.D1._",
    "my-project._hidden.t-1",
    "my-project.d.20260101",
    f"my-project.{'d' * 1024}.{'t' * 1024}",
    "example.com:my-project.d.t",
    "mlsys-local.mlsys_dev.titanic_test",
]
BAD_TABLES = [
    "titanic",
    "mlsys_dev.titanic",
    "my-project.mlsys_dev",
    "my-project.mlsys_dev.",
    "my-project..titanic",
    ".mlsys_dev.titanic",
    "my-project.mlsys_dev.titanic.more",
    "my-project.mlsys-dev.titanic",
    "My-Project.d.t",
    "1project.d.t",
    "-project.d.t",
    "project-.d.t",
    "short.d.t",
    "a" * 31 + ".d.t",
    "my_project.d.t",
    "my-project:d.t",
    "my-project.d.t$20260101",
    "my-project.d.t@-3600",
    "`my-project.d.t`",
    "my-project.d.t ",
    " my-project.d.t",
    "my-project.d.t\n",
    f"my-project.{'d' * 1025}.t",
    f"my-project.d.{'t' * 1025}",
]


@pytest.mark.parametrize("path", GOOD_TABLES)
def test_a_table_path_is_taken_apart_and_put_together_again(path: str) -> None:
    table = TableRef.parse(path)

    assert str(table) == path
    assert table.resource == (
        f"projects/{table.project}/datasets/{table.dataset}/tables/{table.table}"
    )
    assert f"{table.project}.{table.dataset}.{table.table}" == path


def test_the_project_of_a_domain_keeps_its_domain() -> None:
    assert TableRef.parse("example.com:my-project.d.t") == TableRef(
        "example.com:my-project", "d", "t"
    )


@pytest.mark.parametrize("path", [*BAD_TABLES, *HOSTILE])
def test_anything_else_is_no_table_path(path: str) -> None:
    with pytest.raises(InvalidRequest, match=r"project\.dataset\.table") as raised:
        TableRef.parse(path)
    assert_can_be_told(str(raised.value))


@pytest.mark.parametrize("part", HOSTILE)
@pytest.mark.parametrize("place", ["{}.d.t", "my-project.{}.t", "my-project.d.{}"])
def test_no_part_of_a_table_path_may_be_hostile(place: str, part: str) -> None:
    with pytest.raises(InvalidRequest):
        TableRef.parse(place.format(part))


GOOD_MODELS = ["a", "7", "titanic-survival", "a-1-b-2", "2026-churn", "x" * 63]
BAD_MODELS = [
    "Titanic",
    "titanic_survival",
    "-titanic",
    "titanic-",
    "titanic--survival",
    "titanic.survival",
    "-",
    "x" * 64,
    "a-" * 31 + "ab",
    "titanic\n",
]


@pytest.mark.parametrize("name", GOOD_MODELS)
def test_a_model_name_is_lower_case_words_joined_by_hyphens(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize("name", [*BAD_MODELS, *HOSTILE])
def test_anything_else_is_no_model_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match="such as titanic-survival") as raised:
        check_model_name(name)
    assert_can_be_told(str(raised.value))


GOOD_VERSIONS = ["v1", "v2", "v10", "v999999999"]
BAD_VERSIONS = [
    "v0",
    "v01",
    "v",
    "1",
    "V1",
    "v1.0",
    "v-1",
    "v+1",
    "v1\n",
    "v\uff11",
    "v٣",
    "v²",
    "Latest",
]


@pytest.mark.parametrize("version", [*GOOD_VERSIONS, "latest"])
def test_a_version_is_v_and_a_number_or_latest(version: str) -> None:
    assert check_version(version) == version


@pytest.mark.parametrize("version", [*BAD_VERSIONS, "v1000000000", "latest ", *HOSTILE])
def test_anything_else_is_no_version(version: str) -> None:
    with pytest.raises(InvalidRequest, match="Use v1, v2, … or latest") as raised:
        check_version(version)
    assert_can_be_told(str(raised.value))


def test_versions_are_ordered_by_their_numbers() -> None:
    assert [version_number(version) for version in GOOD_VERSIONS] == [1, 2, 10, 999_999_999]


@pytest.mark.parametrize("name", GOOD_MODELS)
@pytest.mark.parametrize("version", GOOD_VERSIONS)
def test_the_path_of_an_artifact_is_found_again_in_a_bucket(name: str, version: str) -> None:
    path = artifact_path(name, version)

    assert path == f"{name}/{version}/model.pkl"
    assert parse_artifact_path(path) == (name, version)


@pytest.mark.parametrize(
    "path",
    [
        "titanic/v1/metadata.json",
        "titanic/v1/model.pkl.bak",
        "titanic/v1/model_pkl",
        "titanic/v1/",
        "titanic/v1",
        "titanic/model.pkl",
        "titanic/latest/model.pkl",
        "titanic/v1/old/model.pkl",
        "team/titanic/v1/model.pkl",
        "/titanic/v1/model.pkl",
        "titanic/v1/model.pkl\n",
        "titanic//model.pkl",
        *(f"{name}/v1/model.pkl" for name in [*BAD_MODELS, *HOSTILE]),
        *(f"titanic/{version}/model.pkl" for version in [*BAD_VERSIONS, *HOSTILE]),
    ],
)
def test_any_other_path_is_no_artifact(path: str) -> None:
    assert parse_artifact_path(path) is None


def test_other_files_lie_beside_the_model() -> None:
    assert artifact_path("titanic", "v3", "metadata.json") == "titanic/v3/metadata.json"


def test_an_environment_is_one_of_three() -> None:
    assert [str(env) for env in Environment] == ["dev", "staging", "prod"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_shown_of_a_text_is_printable_and_short(text: str) -> None:
    assert_can_be_told(shown(text))
    assert len(shown(text, limit=10)) <= 10 * len("\\U0001f6a2") + len("'\\u2026'")


def test_a_short_plain_text_is_shown_as_it_is() -> None:
    assert shown("titanic") == "'titanic'"
    assert shown("x" * 80) == f"'{'x' * 80}'"
    assert shown("x" * 81) == f"'{'x' * 80}\\u2026'"


def assert_can_be_told(message: str) -> None:
    assert message.isprintable()
    assert len(message) < 1000
