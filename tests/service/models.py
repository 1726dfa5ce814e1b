"""Models that behave as a test asks. Importable, since a service unpickles them by their path."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter, defaultdict
from typing import Any

import numpy as np

_PATIENCE = 60

_events: defaultdict[str, threading.Event] = defaultdict(threading.Event)
calls: Counter[str] = Counter()


def event(name: str) -> threading.Event:
    """The event of this process by that name."""
    return _events[name]


class Doubles:
    """Predicts twice `x`."""

    feature_names_in_ = np.array(["x"])
    n_features_in_ = 1

    def predict(self, rows: Any) -> np.ndarray:
        return rows["x"].to_numpy(dtype=float) * 2


class Times(Doubles):
    """Predicts so many times `x`, from a file of a little more than `size` bytes."""

    def __init__(self, factor: float, size: int = 0) -> None:
        self.factor = factor
        self.padding = bytes(size)

    def predict(self, rows: Any) -> np.ndarray:
        return rows["x"].to_numpy(dtype=float) * self.factor


class Gated(Doubles):
    """Says `{name} entered` when it is given rows, and answers when `{name} open` is set."""

    def __init__(self, name: str, *, sample: bool = False) -> None:
        self.name = name
        self.sample = sample

    def predict(self, rows: Any) -> np.ndarray:
        # One row is what the service asks to see what the model answers.
        if len(rows) > 1 or self.sample:
            event(f"{self.name} entered").set()
            assert event(f"{self.name} open").wait(_PATIENCE)
        return super().predict(rows)


class Counted(Doubles):
    """Counts the rows it is given and its unpicklings in `calls`, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        calls[f"{self.name} unpickled"] += 1

    def predict(self, rows: Any) -> np.ndarray:
        if len(rows) > 1:
            calls[f"{self.name} rows"] += len(rows)
        return super().predict(rows)


class LoadsSlowly(Counted):
    """Says `{name} loading` when it is unpickled, and is done when `{name} open` is set."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        event(f"{self.name} loading").set()
        assert event(f"{self.name} open").wait(_PATIENCE)


class RaisesAt(Doubles):
    """Raises on a row whose `x` is the given one; the message quotes the cell, a path and more."""

    def __init__(self, x: float, *, exception: type[BaseException] = ValueError) -> None:
        self.x = x
        self.exception = exception

    def predict(self, rows: Any) -> np.ndarray:
        if len(rows) and (rows["x"] == self.x).any():
            raise self.exception(f"no answer for {self.x}; see /srv/models/secret/notes.txt")
        return super().predict(rows)


class Raises(Doubles):
    """Raises whatever it is given."""

    def __init__(self, exception: BaseException) -> None:
        self.exception = exception

    def predict(self, rows: Any) -> np.ndarray:
        raise self.exception


class Panic(BaseException):
    """As a panic in Rust comes out of polars: no Exception."""


class Warns(Doubles):
    """Warns each time."""

    def predict(self, rows: Any) -> np.ndarray:
        warnings.warn("take care", UserWarning, stacklevel=1)
        return super().predict(rows)


class _Call:
    """Pickles as a call of a function: what a pickle does as it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def fail(kind: str, message: str) -> None:
    """Raises one of Python's own exceptions by its name."""
    raise getattr(builtins, kind)(message)


def fails_to_load(kind: str, message: str) -> object:
    """Something whose pickle raises that exception when it is loaded."""
    return _Call(fail, kind, message)


class NumpyHeavy(Doubles):
    """Keeps the linear algebra library busy: about a second for each call."""

    def predict(self, rows: Any) -> np.ndarray:
        if len(rows) > 1:
            square = np.ones((1200, 1200))
            for _ in range(10):
                square = square @ square / 1200
        return super().predict(rows)


class PythonHeavy(Doubles):
    """Never lets go of the interpreter by itself: about a second for each call."""

    def predict(self, rows: Any) -> np.ndarray:
        if len(rows) > 1:
            sum(number * number % 7 for number in range(10_000_000))
        return super().predict(rows)


class ReadsPipes(Doubles):
    """Says that it was given rows by opening one named pipe, answers when another is closed.

    What `Gated` is within a process, between processes.
    """

    def __init__(self, entered: str, leave: str) -> None:
        self.entered = entered
        self.leave = leave

    def predict(self, rows: Any) -> np.ndarray:
        if len(rows) > 1:
            with open(self.entered, "w"):
                pass
            with open(self.leave) as pipe:
                pipe.read()
        return super().predict(rows)


class PythonPerRow(Doubles):
    """Takes so many microseconds for each row, and holds the interpreter meanwhile."""

    def __init__(
        self, micros: float, *, dies_at: float | None = None, raises_at: float | None = None
    ) -> None:
        self.micros = micros
        self.dies_at = dies_at
        self.raises_at = raises_at

    def predict(self, rows: Any) -> np.ndarray:
        if multiprocessing.parent_process() and (rows["x"] == self.dies_at).any():
            os.kill(os.getpid(), signal.SIGKILL)
        if (rows["x"] == self.raises_at).any():
            raise ArithmeticError("no")
        end = time.thread_time() + self.micros * len(rows) / 1e6
        while time.thread_time() < end:
            pass
        return super().predict(rows)


class StaysAtHome(PythonPerRow):
    """Can't be unpickled in a process that another one has started."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if multiprocessing.parent_process():
            raise ArithmeticError("not here")
        self.__dict__.update(state)


_MEETING = threading.Barrier(2)


class Meets(Doubles):
    """Answers several rows only while another call is at work as well."""

    def predict(self, rows: Any) -> np.ndarray:
        if len(rows) > 1:
            _MEETING.wait(_PATIENCE)
        return super().predict(rows)


def _double(value: float) -> float:
    return 2 * value


class Forks(Doubles):
    """Predicts in processes of its own, which it forks for each call."""

    def predict(self, rows: Any) -> np.ndarray:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return np.array(pool.map(_double, rows["x"].tolist()))


class EatsMemory(Doubles):
    """Takes and keeps so many MiB more in each call, which goes on for a while after that."""

    def __init__(self, mib: int, seconds: float = 0) -> None:
        self.mib = mib
        self.seconds = seconds
        self.eaten: list[np.ndarray] = []

    def predict(self, rows: Any) -> np.ndarray:
        if len(rows) > 1:
            self.eaten.append(np.ones(self.mib << 17))
            time.sleep(self.seconds)
        return super().predict(rows)
