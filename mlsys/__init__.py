"""Batch predictions for teams on Google Cloud: the library for notebooks and scripts.

    import mlsys

    mlsys.vis.set_style()
    passengers = mlsys.bq_get("my-project.mlsys_dev.titanic_train")
    model = make_pipeline(...).fit(passengers[features], passengers["Survived"])
    mlsys.publish_model(model, "titanic-survival", rows=passengers[features], target="Survived")

Each name is imported when it is first used, so that `import mlsys` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlsys import vis
    from mlsys.bq import bq_get, bq_iter, bq_put
    from mlsys.errors import MlsysError
    from mlsys.gcs import gcs_get, gcs_get_pickle, gcs_list_blobs, gcs_put, gcs_put_pickle
    from mlsys.publish import publish_model
    from mlsys.settings import Settings

__all__ = [
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

_HOME = {
    "MlsysError": "mlsys.errors",
    "Settings": "mlsys.settings",
    "bq_get": "mlsys.bq",
    "bq_iter": "mlsys.bq",
    "bq_put": "mlsys.bq",
    "gcs_get": "mlsys.gcs",
    "gcs_get_pickle": "mlsys.gcs",
    "gcs_list_blobs": "mlsys.gcs",
    "gcs_put": "mlsys.gcs",
    "gcs_put_pickle": "mlsys.gcs",
    "publish_model": "mlsys.publish",
}


def __getattr__(name: str) -> Any:
    if name == "vis":
        return import_module("mlsys.vis")
    if name not in _HOME:
        raise AttributeError(f"module 'mlsys' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
