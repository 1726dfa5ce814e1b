"""Settings, from the environment or `.env`. `.env.example` documents each."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from mlsys.names import Environment

MIB = 1024 * 1024

# BigQuery refuses an AppendRows request over 10 MB; a request carries a header beside its rows.
LARGEST_APPEND = 9 * MIB

Compression = Literal["none", "lz4", "zstd"]


class Settings(BaseSettings):
    """Frozen: made once when a process starts, and handed to whatever needs it."""

    model_config = SettingsConfigDict(
        env_file=".env", frozen=True, extra="ignore", env_ignore_empty=True
    )

    gcp_project_id: str | None = Field(None, description="The project that pays for reads")
    gcp_region: str = Field("us-central1", description="Where the service and its buckets live")
    mlsys_env: Environment | None = Field(
        None, description="The only environment this deployment answers for; unset: all of them"
    )
    gcs_bucket_models_dev: str = "mlsys-models-dev"
    gcs_bucket_models_staging: str = "mlsys-models-staging"
    gcs_bucket_models_prod: str = "mlsys-models-prod"

    gcs_bucket_runs_dev: str = "mlsys-runs-dev"
    gcs_bucket_runs_staging: str = "mlsys-runs-staging"
    gcs_bucket_runs_prod: str = "mlsys-runs-prod"

    bigquery_emulator_host: str | None = Field(None, description="http://host:port")
    bigquery_storage_emulator_host: str | None = Field(None, description="host:port, gRPC")
    storage_emulator_host: str | None = Field(None, description="http://host:port")

    read_streams: PositiveInt = Field(
        default_factory=lambda: max(2, os.cpu_count() or 1),
        le=1000,
        description="Most read streams a run asks for; each holds up to three messages in memory",
    )
    read_compression: Compression = Field(
        "none", description="How rows come from BigQuery: for networks that are slower than a core"
    )
    chunk_rows: PositiveInt | None = Field(
        None, description="Rows a predict call gets by default; unset: found out in each run"
    )
    chunk_bytes: PositiveInt = Field(
        6 * MIB, description="Most bytes of a chunk whose size is found out"
    )
    append_request_bytes: Annotated[PositiveInt, Field(le=LARGEST_APPEND)] = Field(
        2 * MIB, description="Largest append request of more than one row"
    )
    append_unacked_bytes: PositiveInt = Field(
        4 * MIB, description="Bytes a stream has under way before it waits for an answer"
    )
    predict_threads: PositiveInt = Field(
        default_factory=lambda: os.cpu_count() or 1, description="Predict calls at once"
    )
    worker_processes: NonNegativeInt = Field(
        default_factory=lambda: os.cpu_count() or 1,
        description="Processes of a run whose model holds Python's interpreter; 0: never any",
    )
    model_cache_bytes: PositiveInt = Field(
        256 * MIB, description="Size of the artifacts that are kept unpickled"
    )
    max_runs: PositiveInt = Field(2, description="Runs at once; further ones are answered 429")
    memory_limit_bytes: PositiveInt | None = Field(
        None, description="Memory of this instance; unset: what its container or the machine has"
    )
    run_memory_bytes: PositiveInt = Field(
        64 * MIB, description="Memory that a run is expected to take, for it to begin beside others"
    )
    lease_seconds: PositiveFloat = Field(
        30, description="How long a run that tells nothing of itself is taken to be alive"
    )
    retry_seconds: PositiveFloat = Field(
        60, description="How long a call that makes no progress is tried again"
    )
    silence_seconds: PositiveFloat = Field(
        120, description="How long a stream may say nothing before it is opened again"
    )
    progress_seconds: PositiveFloat = Field(0.5, description="Time between progress events")

    def model_bucket(self, env: Environment) -> str:
        """The one bucket that models of `env` are loaded from."""
        return getattr(self, f"gcs_bucket_models_{env}")

    def runs_bucket(self, env: Environment) -> str:
        """Where the journal of the runs of `env` is."""
        return getattr(self, f"gcs_bucket_runs_{env}")
