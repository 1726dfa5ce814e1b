"""What goes over the wire: requests, results, progress and problems."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mlsys.names import (
    Environment,
    TableRef,
    check_model_name,
    check_version,
    is_column_name,
    is_text,
    shown,
)

RUN_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
MOST_CHUNK_ROWS = 1_000_000


def _check_table(path: str) -> str:
    return str(TableRef.parse(path))


def _check_column(name: str) -> str:
    if not is_column_name(name):
        raise ValueError(f"{shown(name)} can't be the name of a column in BigQuery")
    return name


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("Input should be a valid integer")  # Or true would be a chunk of one row.
    return value


def _check_filter(condition: str) -> str:
    if not is_text(condition):
        raise ValueError("holds half of a surrogate pair, which no text does")
    if not condition.strip():
        raise ValueError("is blank. Write a condition in SQL, or leave it out for every row")
    return condition


TablePath = Annotated[
    str,
    AfterValidator(_check_table),
    Field(description="Full path: `project.dataset.table`", max_length=2200),
]
ColumnName = Annotated[str, AfterValidator(_check_column), Field(min_length=1, max_length=300)]


class PredictRequest(BaseModel):
    """Which rows, which model, and where the predictions go."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    env: Annotated[Environment, Field(description="Whose models to use", examples=["dev"])]
    input_table: Annotated[TablePath, Field(examples=["my-project.mlsys_dev.titanic_test"])]
    output_table: Annotated[TablePath, Field(examples=["my-project.mlsys_dev.titanic_scored"])]
    model_name: Annotated[
        str, AfterValidator(check_model_name), Field(examples=["titanic-survival"])
    ]
    model_version: Annotated[
        str,
        AfterValidator(check_version),
        Field(description="`v1`, `v2`, … or `latest`", examples=["latest"]),
    ]
    run_id: Annotated[
        str | None,
        Field(pattern=RUN_ID_PATTERN, description="Your name for this run", examples=["nightly-7"]),
    ] = None
    id_columns: Annotated[
        list[ColumnName] | None,
        Field(
            description="Columns to carry to the output; by default what the model's metadata "
            "names, else every column that is not a feature",
            max_length=1000,
            examples=[["PassengerId"]],
        ),
    ] = None
    where: Annotated[
        Annotated[str, AfterValidator(_check_filter)] | None,
        Field(
            description="A row filter in SQL, applied as the table is read",
            min_length=1,
            max_length=10_000,
            examples=["Pclass = 3"],
        ),
    ] = None
    chunk_rows: Annotated[
        Annotated[int, Field(ge=1, le=MOST_CHUNK_ROWS)] | None,
        BeforeValidator(_not_bool),
        Field(description="Rows a predict call gets", examples=[10_000]),
    ] = None


class ModelUsed(BaseModel):
    """The model of a run, down to the generation of its object."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    uri: str = Field(description="Where it was loaded from, `gs://…`")
    generation: int


_RESULT: dict[str, Any] = {
    "status": "succeeded",
    "message": "262 rows predicted by titanic-survival v3 and appended to "
    "my-project.mlsys_dev.titanic_scored.",
    "run_id": "nightly-7",
    "rows": 262,
    "input_table": "my-project.mlsys_dev.titanic_test",
    "output_table": "my-project.mlsys_dev.titanic_scored",
    "model": {
        "name": "titanic-survival",
        "version": "v3",
        "uri": "gs://mlsys-models-dev/titanic-survival/v3/model.pkl",
        "generation": 1764230400123456,
    },
    "started_at": "2026-11-27T08:00:00.250000Z",
    "ended_at": "2026-11-27T08:00:02.750000Z",
    "seconds": 2.5,
    "rows_per_second": 104.8,
    "peak_memory_bytes": 268435456,
}
_PROGRESS: dict[str, Any] = {
    "run_id": "nightly-7",
    "rows_done": 131,
    "rows_total": 262,
    "rows_per_second": 104.8,
    "seconds_left": 1.25,
}


class PredictResult(BaseModel):
    """A run that ended well: every row is in the output table."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_RESULT]})

    status: Literal["succeeded"] = "succeeded"
    message: str
    run_id: str
    rows: int
    input_table: str
    output_table: str
    model: ModelUsed
    started_at: datetime
    ended_at: datetime
    seconds: float
    rows_per_second: float
    peak_memory_bytes: int = Field(description="The most memory this process has held so far")


class ProgressEvent(BaseModel):
    """How far a run has come."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_PROGRESS]})

    run_id: str
    rows_done: int
    rows_total: int | None = Field(description="Unknown where a filter is set")
    rows_per_second: float
    seconds_left: float | None


class Problem(BaseModel):
    """An error, as RFC 9457 lays it out. Some kinds carry further members."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:mlsys:table-mismatch"])
    title: str = Field(examples=["The table does not fit"])
    status: int = Field(examples=[422])
    detail: str = Field(description="What is wrong and what mends it")
    instance: str | None = Field(None, description="The run, where there is one")


class RunState(StrEnum):
    """How far a run is known to have come."""

    RUNNING = "running"
    PREPARED = "prepared"
    COMMITTED = "committed"
    FAILED = "failed"


class RunInfo(BaseModel):
    """A run as its journal tells of it."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    run_id: str
    state: RunState = Field(
        description="`prepared`: every row is stored, and not known yet to be visible"
    )
    request: PredictRequest
    model_version: str
    model_generation: int
    started_at: datetime = Field(description="Of its latest attempt")
    updated_at: datetime
    attempts: int
    rows_done: int
    rows_total: int | None = None
    result: PredictResult | None = None
    error: Problem | None = None
    abandoned: bool = Field(
        False,
        description="Not at its end, and nobody is at it: its process is gone. The same call with "
        "its `run_id` takes it over.",
    )


class RunsRequest(BaseModel):
    """Which runs to show."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: Annotated[
        Environment | None,
        Field(description="Whose runs; by default this deployment's", examples=["dev"]),
    ] = None
    state: RunState | None = None
    page: str | None = Field(None, max_length=200, description="`next_page` of the page before")
    limit: int = Field(20, ge=1, le=100)


class RunPage(BaseModel):
    """Some runs, newest first."""

    model_config = ConfigDict(frozen=True)

    runs: list[RunInfo]
    next_page: str | None = Field(None, description="The `page` that follows; none: the last one")


class RegistryRequest(BaseModel):
    """Which bucket to scan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: Annotated[Environment, Field(description="Whose models to register", examples=["dev"])]


class RegisteredModel(BaseModel):
    """A version of a model, and the generation of its object."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str = Field(examples=["v3"])
    generation: int | None = Field(description="Unknown where an older row does not tell")
    problem: str | None = Field(
        None, description="Why it is registered as not verified: what its golden rows have shown"
    )


class SkippedObject(BaseModel):
    """An object of the bucket that a scan does not take."""

    model_config = ConfigDict(frozen=True)

    path: str
    reason: str = Field(description="Why, and what mends it")


class RegistryCounts(BaseModel):
    """How many of each."""

    model_config = ConfigDict(frozen=True)

    objects: int
    registered: int
    deleted: int
    skipped: int


class RegistryScan(BaseModel):
    """What a scan of a model bucket has found, and written into the registry table."""

    model_config = ConfigDict(frozen=True)

    env: Environment
    bucket: str
    table: str
    registered: list[RegisteredModel] = Field(description="Every model in the bucket")
    deleted: list[RegisteredModel] = Field(
        description="Models that this scan was the first to miss; their rows stay, marked"
    )
    skipped: list[SkippedObject]
    counts: RegistryCounts
    seconds: float


class Health(BaseModel):
    """The service is up."""

    status: Literal["ok"] = "ok"


class About(BaseModel):
    """What answers here."""

    service: Literal["mlsys"] = "mlsys"
    version: str
    documentation: str
