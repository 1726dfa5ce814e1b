"""The job of `peers.py` by other means, each in a process of its own.

    python benchmarks/contestants.py whole '{"input": …, "output": …, …}'

Runs in the environment of the group `peers`, where this project is not installed. It prints a line
of JSON: the seconds that the job took, from the first call of Google's client to the last row
committed, without the imports, nor the start of Ray and its workers.

A table comes in by the Storage Read API and leaves by load jobs, as all of them do by themselves.
What they could not know is where the local servers are. These take load jobs of no content type but
a named one, and none for a table that does not exist, so it is made before.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pandas as pd
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from google.cloud.bigquery import client as bigquery_client
from google.cloud.bigquery_storage_v1 import BigQueryReadClient, types
from google.cloud.bigquery_storage_v1.services.big_query_read.transports import (
    BigQueryReadGrpcTransport,
)

# Rows that a model is given at once, and that a load job brings.
_CHUNK_ROWS = 65_536
_LOAD_ROWS = 500_000


@dataclass(frozen=True)
class Job:
    """Paths of tables, the file of the pickled model, and which columns it asks for."""

    project: str
    input: str
    output: str
    model: str
    features: Sequence[str]
    cores: int

    def load(self) -> Any:
        return pickle.loads(Path(self.model).read_bytes())


# Google's clients, led to the local servers


def tables(project_id: str) -> bigquery.Client:
    """The client reads BIGQUERY_EMULATOR_HOST itself."""
    bigquery_client._GENERIC_CONTENT_TYPE = "application/octet-stream"
    return bigquery.Client(project=project_id, credentials=AnonymousCredentials())


def rows() -> BigQueryReadClient:
    """The client of the Storage Read API."""
    channel = grpc.insecure_channel(
        os.environ["BIGQUERY_STORAGE_EMULATOR_HOST"], [("grpc.max_receive_message_length", -1)]
    )
    return BigQueryReadClient(transport=BigQueryReadGrpcTransport(channel=channel))


def scored(model: Any, ids: Any, features: Any, *, one_pass: bool = True) -> pd.DataFrame:
    """The columns that the service writes.

    Args:
        one_pass: the model is asked once, as the service asks it, which takes knowing that its
            label is the class of the highest probability; else for each, as its methods are.
    """
    if hasattr(model, "predict_proba"):
        shares = model.predict_proba(features)
        most = model.classes_.take(shares.argmax(axis=1)) if one_pass else model.predict(features)
        columns = {"Prediction": most, "PredictionProbability": shares[:, 1]}
    else:
        columns = {"Prediction": model.predict(features)}
    return pd.DataFrame(
        {"id": ids}
        | columns
        | {
            "PredictionTimestamp": datetime.now(UTC),
            "ModelName": "benchmark",
            "ModelVersion": "v1",
        }
    )


def append(client: bigquery.Client, frame: pd.DataFrame, table: str) -> None:
    """One load job."""
    client.load_table_from_dataframe(frame, table).result()


# The ways


def whole(job: Job, *, one_pass: bool = False) -> None:
    """One frame, `predict` and `predict_proba`, one load job."""
    model, client = job.load(), tables(job.project)
    frame = client.list_rows(job.input).to_dataframe(bqstorage_client=rows())
    told = scored(model, frame["id"], frame[list(job.features)], one_pass=one_pass)
    append(client, told, job.output)


def whole_one_pass(job: Job) -> None:
    """The same with `predict_proba` alone."""
    whole(job, one_pass=True)


def ray(job: Job) -> None:
    """Ray Data's own connector, its blocks as they come; a task a core."""
    import ray as library

    lead_ray()
    model = library.put(job.load())
    features, (_, _, source), (_, _, output) = (
        list(job.features),
        job.input.partition("."),
        job.output.partition("."),
    )

    def predict(frame: pd.DataFrame) -> pd.DataFrame:
        return scored(library.get(model), frame["id"], frame[features])

    library.data.read_bigquery(job.project, source).map_batches(
        predict, batch_format="pandas", batch_size=_CHUNK_ROWS
    ).write_bigquery(job.project, output, overwrite_table=False)


def lead_ray() -> None:
    """In each of its processes: the clients look for credentials and for Google otherwise."""
    from ray.data._internal.datasource import bigquery_datasource

    bigquery_datasource._create_client = tables
    bigquery_datasource._create_read_client = rows


def warm_ray(batch: Any, job: Job) -> Any:
    """In each of its workers: imports what the model is made of."""
    time.sleep(1)  # Or one worker would take every task.
    job.load()
    return batch


def beam_by_chunk(job: Job) -> None:
    """Beam's RunInference, an element a chunk of rows."""

    def chunks(stream: str) -> Iterator[np.ndarray]:
        for part in _arrays(stream):
            yield from (part[at : at + _CHUNK_ROWS] for at in range(0, len(part), _CHUNK_ROWS))

    _beam(
        job,
        chunks,
        1,
        _LOAD_ROWS // _CHUNK_ROWS,
        lambda model, batch: [_answer(model, part) for part in batch],
    )


def beam_by_row(job: Job) -> None:
    """Beam's RunInference as its guide shows it, an element a row."""

    def each(stream: str) -> Iterator[np.ndarray]:
        for part in _arrays(stream):
            yield from part

    _beam(job, each, _CHUNK_ROWS, _LOAD_ROWS, lambda model, batch: _answer(model, np.stack(batch)))


def _arrays(stream: str) -> Iterator[np.ndarray]:
    for page in rows().read_rows(stream).rows().pages:
        yield np.column_stack([column.to_numpy() for column in page.to_arrow().columns])


def _answer(model: Any, part: np.ndarray) -> np.ndarray:
    """Ids first, answers after them: a row in, a row out."""
    told = scored(model, part[:, 0], part[:, 1:])
    return told.select_dtypes(["number", "bool"]).to_numpy(float)


def _beam(
    job: Job,
    read: Callable[[str], Iterator[np.ndarray]],
    batch: int,
    load_batch: int,
    infer: Callable[[Any, Sequence[np.ndarray]], Any],
) -> None:
    import apache_beam as library
    from apache_beam.ml.inference.base import RunInference
    from apache_beam.ml.inference.sklearn_inference import SklearnModelHandlerNumpy
    from apache_beam.options.pipeline_options import PipelineOptions

    table = "projects/{}/datasets/{}/tables/{}".format(*job.input.split("."))
    session = rows().create_read_session(
        parent=f"projects/{job.project}",
        read_session=types.ReadSession(
            table=table,
            data_format=types.DataFormat.ARROW,
            read_options={"selected_fields": ["id", *job.features]},
        ),
        max_stream_count=job.cores,
    )
    handler = SklearnModelHandlerNumpy(
        job.model,
        inference_fn=lambda model, batch, _=None: infer(model, batch),
        min_batch_size=batch,
        max_batch_size=batch,
    )
    names = ["id", "Prediction", "PredictionProbability"]

    def load(parts: Sequence[np.ndarray]) -> None:
        told = np.vstack(parts)
        frame = pd.DataFrame(dict(zip(names, told.T, strict=False)))
        frame = frame.astype({"id": "int64"})
        frame["PredictionTimestamp"] = datetime.now(UTC)
        frame["ModelName"], frame["ModelVersion"] = "benchmark", "v1"
        append(tables(job.project), frame, job.output)

    # What the direct runner comes to here. By that name it would look for another one, written in
    # Go, and download it where it can, in the time that is measured.
    options = PipelineOptions(
        runner="apache_beam.runners.portability.fn_api_runner.FnApiRunner",
        direct_num_workers=job.cores,
        direct_running_mode="multi_threading",
    )
    with library.Pipeline(options=options) as pipeline:
        (
            pipeline
            | library.Create([stream.name for stream in session.streams])
            | library.Reshuffle()
            | library.FlatMap(read)
            | RunInference(handler)
            | library.Map(lambda result: result.inference)
            | library.BatchElements(load_batch, load_batch)
            | library.Map(load)
        )


WAYS = {each.__name__: each for each in (whole, whole_one_pass, ray, beam_by_chunk, beam_by_row)}


def main() -> None:
    logging.disable(logging.WARNING)
    way, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    if way == "ray":
        import ray as library

        library.init(
            num_cpus=job.cores,
            include_dashboard=False,
            logging_level="error",
            runtime_env={"worker_process_setup_hook": lead_ray},
        )
        # Its workers start with a first job, and stay.
        library.data.range(job.cores, override_num_blocks=job.cores).map_batches(
            warm_ray, fn_args=[job]
        ).materialize()
    elif way.startswith("beam"):
        import apache_beam.ml.inference.sklearn_inference  # noqa: F401
    else:
        job.load()  # Imports what the model is made of, as it did when it was warmed up elsewhere.
    start = time.perf_counter()
    WAYS[way](job)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
