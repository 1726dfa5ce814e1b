"""`import mlsys`: the whole library by name, and next to nothing loaded."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import mlsys
from tests.service.support import process_environment

HEAVY = {
    "aiohttp",
    "anyio",
    "google",
    "grpc",
    "joblib",
    "matplotlib",
    "numpy",
    "pandas",
    "polars",
    "pyarrow",
    "pydantic",
    "rich",
    "sklearn",
}


def loaded_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after some code."""
    code = f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=process_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return {module.partition(".")[0] for module in json.loads(done.stdout)}


def test_the_public_names_are_these() -> None:
    assert mlsys.__all__ == [
        "MlsysError",
        "Settings",
        "bq_get",
        "bq_iter",
        "bq_put",
        "gcs_get",
        "gcs_get_pickle",
        "gcs_list_blobs",
        "gcs_put",
        "gcs_put_pickle",
        "publish_model",
        "vis",
    ]


@pytest.mark.parametrize("name", mlsys.__all__)
def test_each_name_is_there_and_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(mlsys, name))
    assert name in dir(mlsys)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mlsys' has no attribute 'bq_got'"):
        mlsys.bq_got  # noqa: B018
    with pytest.raises(ImportError, match="bq_got"):
        exec("from mlsys import bq_got")
    assert not hasattr(mlsys, "__wrapped__")


def test_everything_may_be_imported_with_a_star() -> None:
    names: dict[str, object] = {}

    exec("from mlsys import *", names)

    assert names.keys() >= set(mlsys.__all__)


def test_the_import_alone_loads_nothing_heavy() -> None:
    assert loaded_by("import mlsys") & HEAVY == set()
    # Nor does looking around in it, as an editor or a notebook does.
    assert loaded_by("import mlsys; dir(mlsys); help; mlsys.__doc__") & HEAVY == set()


def test_a_helper_loads_what_it_needs_and_no_more() -> None:
    assert loaded_by("import mlsys; mlsys.bq_get") & {"matplotlib", "sklearn", "polars"} == set()
    assert loaded_by("import mlsys; mlsys.publish_model") & {"matplotlib", "polars"} == set()
    assert loaded_by("import mlsys; mlsys.vis") & {"google", "grpc", "polars"} == set()
    assert loaded_by("import mlsys; mlsys.MlsysError") & HEAVY == set()
