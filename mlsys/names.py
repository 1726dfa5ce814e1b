"""Names and paths: validated once, here, before anything is asked of Google Cloud.

Every name that reaches a URL, a query or an object path has passed one of these patterns, which
admit only what a name needs: no quotes, no backticks, no dots beyond the two of a table path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from mlsys.errors import InvalidRequest

MODEL_FILE = "model.pkl"
METADATA_FILE = "metadata.json"
LATEST = "latest"

# What a prediction is called where its model does not say, and the last columns of every output.
PREDICTION = "Prediction"
TOLD_NAMES = ("PredictionTimestamp", "ModelName", "ModelVersion")

# https://cloud.google.com/bigquery/docs/schemas#flexible-column-names
LONGEST_COLUMN_NAME = 300
_NO_COLUMN = re.compile(r"""[\x00-\x1f\x7f!"$()*,./;?@\[\\\]^`{}~]""")

# https://cloud.google.com/resource-manager/docs/creating-managing-projects (6 to 30 characters,
# older projects carry a domain), https://cloud.google.com/bigquery/docs/datasets#dataset-naming.
# BigQuery admits more in a table's name (spaces, any letter); this project does not.
_PROJECT = r"(?:[a-z0-9][a-z0-9.-]{0,62}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]"
_TABLE = re.compile(
    rf"(?P<project>{_PROJECT})\.(?P<dataset>\w{{1,1024}})\.(?P<table>[\w-]{{1,1024}})", re.A
)
_MODEL = re.compile(r"(?![a-z0-9-]{64})[a-z0-9]+(?:-[a-z0-9]+)*", re.A)
_VERSION = re.compile(r"v(?P<number>[1-9][0-9]{0,8})", re.A)
_ARTIFACT = re.compile(
    rf"(?P<name>{_MODEL.pattern})/(?P<version>{_VERSION.pattern})/{re.escape(MODEL_FILE)}", re.A
)


class Environment(StrEnum):
    """The three environments of one Google Cloud project."""

    DEV = "dev"
    STAGING = "staging"
    PROD = "prod"


@dataclass(frozen=True, order=True)
class TableRef:
    """A BigQuery table by its full path."""

    project: str
    dataset: str
    table: str

    @classmethod
    def parse(cls, path: str) -> TableRef:
        """Takes `project.dataset.table`.

        Raises:
            InvalidRequest: the path has another form.
        """
        match = _TABLE.fullmatch(path)
        if match is None:
            raise InvalidRequest(
                f"{shown(path)} is not a table path. Write it as project.dataset.table, with "
                "letters, digits, underscores and hyphens only."
            )
        return cls(**match.groupdict())

    def __str__(self) -> str:
        return f"{self.project}.{self.dataset}.{self.table}"

    @property
    def resource(self) -> str:
        """The path of the table in the Storage APIs."""
        return f"projects/{self.project}/datasets/{self.dataset}/tables/{self.table}"


def check_model_name(name: str) -> str:
    """Returns `name` where it is lower case words joined by hyphens, at most 63 characters."""
    if _MODEL.fullmatch(name) is None:
        raise InvalidRequest(
            f"{shown(name)} is not a model name. Use lower case letters, digits and hyphens, "
            "such as titanic-survival."
        )
    return name


def check_version(version: str) -> str:
    """Returns `version` where it is `v1`, `v2`, … or `latest`."""
    if version != LATEST and _VERSION.fullmatch(version) is None:
        raise InvalidRequest(f"{shown(version)} is not a model version. Use v1, v2, … or latest.")
    return version


def is_version_to_write(version: object) -> bool:
    """Whether it is `v1`, `v2`, …: `latest` is what was written last."""
    return isinstance(version, str) and _VERSION.fullmatch(version) is not None


def is_column_name(name: str) -> bool:
    """Whether a column of BigQuery may have this name; the case of letters is ignored there."""
    allowed = len(name) <= LONGEST_COLUMN_NAME and _NO_COLUMN.search(name) is None
    return allowed and bool(name.strip()) and is_text(name)


def version_number(version: str) -> int:
    """The number of a checked version: 3 for `v3`."""
    return int(version.removeprefix("v"))


def artifact_path(name: str, version: str, file: str = MODEL_FILE) -> str:
    """The path of a model's file inside the model bucket: `titanic-survival/v1/model.pkl`."""
    return f"{name}/{version}/{file}"


def parse_artifact_path(path: str) -> tuple[str, str] | None:
    """Model name and version of a `{name}/v{N}/model.pkl`; None for any other path."""
    match = _ARTIFACT.fullmatch(path)
    return (match["name"], match["version"]) if match else None


def is_text(value: str) -> bool:
    """Whether it can be sent anywhere: JSON may spell half of a surrogate pair, UTF-8 may not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: str, limit: int = 80) -> str:
    """A caller's text as it may stand in a message: quoted, printable and short."""
    return ascii(value if len(value) <= limit else value[:limit] + "…")
