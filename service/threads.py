"""Threads that models start by themselves, kept to the cores that a predict call has.

A run predicts as many chunks at once as there are cores. A forest with `n_jobs=-1`, OpenMP in
gradient boosting or OpenBLAS in a linear model would each take all cores for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# No estimator is nested deeper than this; what is, is data.
_DEEPEST = 8
# A forest's trees are alike, and none has threads of its own: a few tell enough.
_MOST_ITEMS = 256


def leave_threads_to_us(estimator: Any) -> None:
    """Has an estimator, and those in it, take as many threads as `Threads.call` says.

    What is predicted is not changed by it. `n_jobs=None` is scikit-learn's "as the context says".
    """
    for each in _estimators(estimator, _DEEPEST, set()):
        if getattr(each, "n_jobs", None) is not None:
            each.n_jobs = None if type(each).__module__.startswith("sklearn.") else 1


def _estimators(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    match value:
        case dict():
            inner = list(value.values())
        case list() | tuple():
            inner = value
        case _ if hasattr(value, "get_params") and hasattr(value, "__dict__"):
            yield value
            inner = list(vars(value).values())
        case _:
            return
    deeper = depth if isinstance(value, dict | list | tuple) else depth - 1
    for each in inner[:_MOST_ITEMS]:
        yield from _estimators(each, deeper, seen)


class Threads:
    """Calls of models with so many threads each."""

    def __init__(self, each: int) -> None:
        from threadpoolctl import ThreadpoolController

        self._each = each
        self._pools = ThreadpoolController()

    def call[T](self, work: Callable[[], T]) -> T:
        """What `work()` returns; to be called in the thread that is to do it."""
        from joblib import parallel_config
        from threadpoolctl import OpenBLASController

        # Before each call: OpenMP has a number for each thread that calls it, and OpenBLAS one for
        # the process, which other runs and scikit-learn itself set as well.
        self._pools.limit(limits=self._each)
        # Or threadpoolctl would let no other thread set it for as long as this one lives.
        OpenBLASController.clear_controlling_thread()
        with parallel_config(backend="threading", n_jobs=self._each):
            return work()
