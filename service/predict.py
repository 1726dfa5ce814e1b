"""Rows in, predictions out: what a model makes of a chunk, off the event loop.

The labels are always those of `model.predict`. Where scikit-learn itself defines them as the
class of the highest probability, or both by one decision function, one pass over the model gives
both. Elsewhere (k neighbours decide by a vote) it takes two, and a pipeline's transformers still
run once.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, partial
from itertools import count
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pyarrow as pa
from anyio.abc import ObjectSendStream
from google.cloud.bigquery import SchemaField

from mlsys.errors import InvalidRequest, ModelRaised, ModelUnusable, redacted
from mlsys.frame import FrameKind, by_columns, to_frame
from mlsys.names import PREDICTION
from mlsys.tables import BIGQUERY_TO_ARROW, bigquery_column, standard_type
from service.arrays import class_path, on_arrays, plain_numbers
from service.plan import TOLD, Output, Plan
from service.sizing import ChunkSize, Cost
from service.source import Chunk, NextChunk, size_of
from service.threads import Threads

PROBABILITY = "PredictionProbability"

# scikit-learn 1.9: predict is classes_.take(argmax(predict_proba(X), axis=1)), to the letter.
_MOST_PROBABLE_IS_LABEL = {
    "sklearn.calibration.CalibratedClassifierCV",
    "sklearn.ensemble._bagging.BaggingClassifier",
    "sklearn.ensemble._forest.ExtraTreesClassifier",
    "sklearn.ensemble._forest.RandomForestClassifier",
    "sklearn.tree._classes.DecisionTreeClassifier",
    "sklearn.tree._classes.ExtraTreeClassifier",
}
# scikit-learn 1.9, for two classes: predict is classes_[decision_function(X) > 0], and
# predict_proba the logistic function of the same.
_DECISION_IS_BOTH = {
    "sklearn.ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingClassifier",
}
_SEARCHES = {
    "sklearn.model_selection._search.GridSearchCV",
    "sklearn.model_selection._search.RandomizedSearchCV",
}


@dataclass(frozen=True)
class Predictor:
    """An estimator, and all that is known of what it answers.

    `classes` holds one array of class labels a target for a classifier, and is empty otherwise.
    """

    estimator: Any
    frame: FrameKind
    features: tuple[str, ...]
    targets: tuple[Output, ...]
    classes: tuple[pa.Array, ...] = ()
    probabilities: tuple[Output, ...] = ()

    @cached_property
    def _on_arrays(self) -> Any | None:
        return on_arrays(self.estimator) if self.frame is FrameKind.PANDAS else None

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The columns that `__call__` makes, in its order."""
        return self.targets + self.probabilities

    def __call__(self, rows: pa.Table) -> list[pa.Array]:
        """Predicts a table of n rows: one array of length n for each of `outputs`."""
        chosen, model = rows.select(self.features), self._on_arrays
        if model is not None and plain_numbers(chosen.schema):
            labels, probabilities = self._predict(model, by_columns(chosen))
        else:
            labels, probabilities = self._predict(self.estimator, to_frame(chosen, self.frame))
        arrays = [*labels, *self._probability_arrays(probabilities)]
        for array in arrays:
            if len(array) != rows.num_rows:
                raise ValueError(f"predict gave {len(array)} answers for {rows.num_rows} rows")
        return arrays

    def _predict(self, estimator: Any, frame: Any) -> tuple[list[pa.Array], Any]:
        if not self.probabilities:
            return self._label_arrays(estimator.predict(frame)), None
        from scipy.special import expit

        model, frame = _last_step(estimator, frame)
        if class_path(model) in _DECISION_IS_BOTH and len(self.classes[0]) == 2:
            decision = model.decision_function(frame)
            labels = self.classes[0].take(pa.array((decision > 0).astype(np.int64)))
            second = expit(decision)
            return [labels], np.column_stack([1 - second, second])
        probabilities = model.predict_proba(frame)
        if len(self.targets) == 1 and class_path(model) in _MOST_PROBABLE_IS_LABEL:
            most_probable = pa.array(np.argmax(probabilities, axis=1))
            return [self.classes[0].take(most_probable)], probabilities
        return self._label_arrays(model.predict(frame)), probabilities

    def _label_arrays(self, labels: Any) -> list[pa.Array]:
        columns = _columns(labels)
        if len(columns) != len(self.targets):
            raise ValueError(
                f"predict gave {len(columns)} columns where {len(self.targets)} are expected; "
                "name them all in the `target` of the model's metadata.json"
            )
        return [_array(c, t.type) for c, t in zip(columns, self.targets, strict=True)]

    def _probability_arrays(self, probabilities: Any) -> list[pa.Array]:
        if not self.probabilities:
            return []
        if len(self.targets) > 1 and not isinstance(probabilities, list):
            columns = _columns(probabilities)  # One a target: that of its second class.
        else:
            by_target = probabilities if isinstance(probabilities, list) else [probabilities]
            columns = [
                column
                for values, classes in zip(by_target, self.classes, strict=True)
                for column in (values[:, 1:] if len(classes) == 2 else values).T
            ]
        if len(columns) != len(self.probabilities):
            raise ValueError(
                f"predict_proba gave {len(columns)} columns where the classes make "
                f"{len(self.probabilities)}"
            )
        return [_array(column, pa.float64()) for column in columns]


def _columns(values: Any) -> list[np.ndarray]:
    """An answer of shape (n,), (n, 1) or (n, k), sparse or not, as its columns."""
    array = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    array = np.atleast_1d(array)
    if array.ndim > 2:
        raise ValueError(f"predict gave an array of {array.ndim} dimensions")
    return [array] if array.ndim == 1 else list(array.T)


def _array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.dtype.kind in "iufb":
        return pa.array(np.ascontiguousarray(values)).cast(kind)
    return pa.array(values.tolist(), kind)


def _last_step(model: Any, frame: Any) -> tuple[Any, Any]:
    """The estimator that decides, and what it sees: scikit-learn's own wrappers undone."""
    while True:
        path = class_path(model)
        if path in _SEARCHES:
            model = model.best_estimator_
        elif path == "sklearn.pipeline.Pipeline" and model.transform_input is None:
            # Not `model[:-1].transform`: a pipeline that ends in a transformer without fitted
            # attributes, such as one of the user's own, takes itself for not fitted.
            for _, step in model.steps[:-1]:
                frame = frame if step in (None, "passthrough") else step.transform(frame)
            model = model.steps[-1][1]
        else:
            return model, frame


def describe(
    estimator: Any, *, frame: FrameKind, features: Sequence[SchemaField], target: Sequence[str]
) -> Predictor:
    """Finds out what an estimator answers, before it is given a row of the table.

    A classifier tells by its classes. What else there is to know, how many columns and of what
    type, is seen from its answer to one row of zeros and empty strings; an estimator that refuses
    such a row is taken to answer one number.

    Args:
        features: the columns it will get, with their types.
        target: the names of its targets from the metadata; empty: not given.

    Raises:
        ModelUnusable: it does not predict, or `target` names another number of columns.
    """
    if not callable(getattr(estimator, "predict", None)):
        raise ModelUnusable(
            f"The model is a {type(estimator).__name__}, which has no `predict`. Upload a fitted "
            "scikit-learn estimator or pipeline."
        )
    columns = _sample_answer(estimator, frame, features)
    classes = _classes(estimator)
    width = len(columns) or len(classes) or len(target) or getattr(estimator, "n_outputs_", 1)
    names = _target_names(target, width)
    if len(classes) == 1 < width:
        classes = _YES_OR_NO * width
    if len(classes) == width:
        kinds = [each.type for each in classes]
    else:
        kinds = [_kind(column) for column in columns] or [_usual_kind(estimator)] * width
        classes = ()
    proba = classes and callable(getattr(estimator, "predict_proba", None))
    return Predictor(
        estimator=estimator,
        frame=frame,
        features=tuple(feature.name for feature in features),
        targets=tuple(map(Output, names, kinds)),
        classes=classes,
        probabilities=tuple(_probabilities(names, classes)) if proba else (),
    )


def _classes(estimator: Any) -> tuple[pa.Array, ...]:
    classes = getattr(estimator, "classes_", None)
    if classes is None:
        return ()
    several = isinstance(classes, list) and all(np.ndim(labels) for labels in classes)
    return tuple(pa.array(np.asarray(c).tolist()) for c in (classes if several else [classes]))


# Where the labels are a matrix of zeros and ones, some classifiers have the numbers of its columns
# for their classes, not the labels in each.
_YES_OR_NO = (pa.array([0, 1]),)


def _target_names(target: Sequence[str], width: int) -> list[str]:
    if len(target) == width:
        return list(target)
    if len(target) > 1:
        raise ModelUnusable(
            f"The model's metadata.json names {len(target)} targets, but the model predicts "
            f"{width}. Name each in `target`."
        )
    name = target[0] if target else PREDICTION
    return [name] if width == 1 else [f"{name}_{number}" for number in range(width)]


def _probabilities(names: Sequence[str], classes: Sequence[pa.Array]) -> Iterator[Output]:
    for name, labels in zip(names, classes, strict=True):
        prefix = PROBABILITY if len(names) == 1 else f"{PROBABILITY}_{name}"
        if len(labels) == 2:
            yield Output(prefix, pa.float64())
            continue
        for label in _as_names(labels.to_pylist()):
            yield Output(f"{prefix}_{label}", pa.float64())


def _as_names(labels: Sequence[object]) -> Iterator[str]:
    """Labels as parts of column names: letters, digits and underscores, each once."""
    taken: set[str] = set()
    for label in labels:
        # Labels are floats where the column that they are from had gaps, as whole as they were.
        shown = str(label).removesuffix(".0") if isinstance(label, float) else str(label)
        name = plain = re.sub(r"\W", "_", shown)
        numbers = count(len(taken))
        while name.casefold() in taken:
            name = f"{plain}_{next(numbers)}"
        taken.add(name.casefold())
        yield name


def _kind(column: np.ndarray) -> pa.DataType:
    kinds = {"i": pa.int64(), "u": pa.int64(), "f": pa.float64(), "b": pa.bool_()}
    if column.dtype.kind in kinds:
        return kinds[column.dtype.kind]
    try:
        kind = pa.array(column).type
        bigquery_column(pa.field(PREDICTION, kind))
    except (pa.ArrowException, InvalidRequest) as error:
        raise ModelUnusable(
            f"The model predicts values of type {column.dtype}, which no column of BigQuery "
            "takes. Let it predict numbers, booleans or strings."
        ) from error
    return kind


def _usual_kind(estimator: Any) -> pa.DataType:
    from sklearn.base import is_clusterer, is_outlier_detector

    if not hasattr(estimator, "__sklearn_tags__"):
        return pa.float64()
    whole = is_clusterer(estimator) or is_outlier_detector(estimator)
    return pa.int64() if whole else pa.float64()


# What is looked through of an exception's message: some quote the whole frame.
_MOST_READ = 10_000
# No float has more. Python makes no int of more than 4,300.
_MOST_DIGITS = 400
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:[eE][-+]?\d{1,3})?")

_ZEROS = {
    "INT64": 0,
    "FLOAT64": 0.0,
    "BOOL": False,
    "STRING": "",
    "BYTES": b"",
    "DATE": dt.date(2000, 1, 1),
    "TIME": dt.time(),
    "DATETIME": dt.datetime(2000, 1, 1),
    "TIMESTAMP": dt.datetime(2000, 1, 1, tzinfo=dt.UTC),
    "NUMERIC": Decimal(0),
    "BIGNUMERIC": Decimal(0),
}


def _sample_answer(
    estimator: Any, frame: FrameKind, features: Sequence[SchemaField]
) -> list[np.ndarray]:
    row = pa.table([_zero(column) for column in features], [column.name for column in features])
    try:
        return _columns(estimator.predict(to_frame(row, frame)))
    except BaseException:  # A row that nobody sent: what the model says of it concerns nobody.
        return []


def _zero(column: SchemaField) -> pa.Array:
    kind = BIGQUERY_TO_ARROW[standard_type(column).removeprefix("ARRAY<").removesuffix(">")]
    if column.mode == "REPEATED":
        return pa.array([[]], pa.list_(kind))
    return pa.array([_ZEROS[standard_type(column)]], kind)


@dataclass(frozen=True)
class Predicted:
    """Rows of the output table, and what it cost to make them."""

    batches: list[pa.RecordBatch]
    cost: Cost


# Predicts the rows of a chunk, off the event loop, here or in another process.
type Predict = Callable[[pa.Table], Awaitable[Predicted]]


async def predict_stream(
    predict: Predict,
    next_chunk: NextChunk,
    out: ObjectSendStream[pa.RecordBatch],
    *,
    sizes: ChunkSize,
) -> None:
    """Predicts chunk by chunk and sends the rows of the output table to `out`.

    Args:
        next_chunk: others may call it as well.
        sizes: how many rows a call gets; told what each call cost.

    Raises:
        ModelRaised: with the exception, the stream and the row in it. Rows are counted from 0 as
            the stream delivers them: a table has no order of its own.
    """

    async def predicted(chunk: Chunk) -> list[pa.RecordBatch]:
        try:
            result = await predict(chunk.rows)
        except Blame as blame:
            raise blame.named(chunk.stream, chunk.first_row) from blame.__cause__
        if not sizes.settled:  # To add up the bytes takes a while.
            sizes.learn(chunk.rows.num_rows, result.cost, size_of(chunk.rows))
        return result.batches

    async with out:
        while (chunk := await next_chunk(sizes.rows)) is not None:
            batches = await predicted(chunk)
            del chunk  # Or it would stay in memory until the next has come; so would its batch.
            while batches:
                await out.send(batches.pop(0))


def in_threads(work: Work, limiter: anyio.CapacityLimiter) -> Predict:
    """Has chunks predicted by threads of this process.

    Args:
        limiter: how many predict calls run at once, over all runs.
    """

    async def predict(rows: pa.Table) -> Predicted:
        return await in_thread(partial(work, rows), limiter)

    return predict


async def in_thread[T](work: Callable[[], T], limiter: anyio.CapacityLimiter) -> T:
    """Runs `work` in a thread. A cancelled call is abandoned, but keeps its place until it ends."""
    loop, place, begun = asyncio.get_running_loop(), object(), threading.Lock()

    def release() -> None:
        limiter.release_on_behalf_of(place)

    def call() -> T | None:
        if not begun.acquire(blocking=False):
            return None  # Cancelled first: nobody waits, and the place is given away.
        try:
            return work()
        finally:
            with suppress(RuntimeError):  # The loop is closed, so nobody waits for a place either.
                loop.call_soon_threadsafe(release)

    await limiter.acquire_on_behalf_of(place)
    try:
        # Under a limiter of its own, for anyio's lets go as soon as a call is abandoned.
        own = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(call, limiter=own, abandon_on_cancel=True)
    finally:
        if begun.acquire(blocking=False):
            release()


class Work:
    """What there is to do for each chunk of a run.

    Args:
        schema: of the rows to be made; see `output_schema`.
        threads: that a call may take; None: as many as it likes.
    """

    def __init__(
        self, predictor: Predictor, plan: Plan, schema: pa.Schema, threads: Threads | None = None
    ) -> None:
        self._predictor = predictor
        self._schema = schema
        self._threads = threads
        # What says when and by which model: the same for each row, so made once.
        self._values = (
            pa.scalar(plan.predicted_at, pa.timestamp("us", "UTC")),
            pa.scalar(plan.model_name, pa.string()),
            pa.scalar(plan.model_version, pa.string()),
        )
        self._told: list[pa.Array] = []

    def __call__(self, rows: pa.Table) -> Predicted:
        """Predicts a chunk, in this thread.

        Raises:
            Blame: the model raised.
        """
        start, on_core = time.perf_counter(), time.thread_time()
        work = partial(self._predict, rows)
        batches = work() if self._threads is None else self._threads.call(work)
        cost = Cost(time.perf_counter() - start, time.thread_time() - on_core)
        return Predicted(batches, cost)

    def _predict(self, rows: pa.Table) -> list[pa.RecordBatch]:
        try:
            predicted = self._predictor(rows)
        except BaseException as error:  # A panic in Rust, where polars is written, is no Exception.
            raise _blame(self._predictor, rows, error) from error
        ids = [rows.column(name) for name in self._schema.names[: -len(predicted) - len(TOLD)]]
        columns = [*ids, *predicted, *self._constants(rows.num_rows)]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        return table.combine_chunks().to_batches()

    def _constants(self, rows: int) -> list[pa.Array]:
        told = self._told
        if not told or len(told[0]) < rows:
            # Another thread may do the same; either will do.
            told = self._told = [pa.repeat(value, rows) for value in self._values]
        return [array.slice(0, rows) for array in told]


class Blame(Exception):
    """What the model raised, and at which row of its chunk where one row alone is enough."""

    def __init__(self, kind: str, message: str | None, rows: int, row: int | None) -> None:
        super().__init__(kind, message, rows, row)  # All, or it could not be pickled.
        self._kind, self._message, self._rows, self._row = kind, message, rows, row

    def named(self, stream: int, first_row: int) -> ModelRaised:
        where = f"somewhere in the {self._rows:,} rows from row {first_row:,}"
        row = None
        if self._row is not None:
            row = first_row + self._row
            where = f"at row {row:,}"
        said = f"{self._kind}: {self._message}" if self._message else self._kind
        return ModelRaised(
            f"The model raised {where} of read stream {stream} (rows count from 0). {said}. "
            "Nothing was written. Exclude such rows with `where`, or publish a model that takes "
            "them.",
            exception=self._kind,
            stream=stream,
            row=row,
        )


def _blame(predictor: Predictor, chunk: pa.Table, error: BaseException) -> Blame:
    """Finds the first row that the model raises on, by halving the chunk.

    The message of an exception may quote values, so only what the model says of that single row
    is passed on, with the row's values and any file paths taken out of it.
    """
    fine, bad = 0, chunk.num_rows
    while bad - fine > 1:
        middle = (fine + bad) // 2
        half = chunk.slice(fine, middle - fine)  # Those before it are known to be fine.
        fine, bad = (fine, middle) if _raised(predictor, half) else (middle, bad)
    row = chunk.slice(bad - 1, 1)
    if (alone := _raised(predictor, row)) is None:
        return Blame(type(error).__name__, None, chunk.num_rows, None)
    try:
        message = str(alone)[:_MOST_READ]
        said = redacted(message, _quoted(message, row.select(predictor.features)))
    except Exception:
        # An exception may raise when asked what it says. What can't be redacted isn't told.
        said = None
    return Blame(type(alone).__name__, said, chunk.num_rows, bad - 1)


def _raised(predictor: Predictor, rows: pa.Table) -> BaseException | None:
    try:
        predictor(rows)
    except BaseException as error:
        return error
    return None


def _quoted(message: str, row: pa.Table) -> set[str]:
    """What in a message is a value of the row, or shows a part of one."""
    values = list(_flat(row.to_pylist()[0].values()))
    sizes = {abs(float(value)) for value in values if isinstance(value, (int, float, Decimal))}
    numbers = {n for n in _NUMBER.findall(message) if any(_shows(n, size) for size in sizes)}
    return numbers | {each for v in values for each in _spellings(v) if each in message}


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value
        elif value is not None:
            yield value


def _shows(number: str, size: float) -> bool:
    """Whether a number in a message is this one, rounded to as many digits."""
    if len(number) > _MOST_DIGITS:
        return False
    if number.isdecimal():
        return int(number) == size
    digits, _, exponent = number.lower().partition("e")
    last_digit = float(f"1e{int(exponent or 0) - len(digits.partition('.')[2])}")
    # A float of 32 bits is shown with more digits than it has.
    return abs(float(number) - size) <= max(last_digit / 2, size * 1e-7)


def _spellings(value: Any) -> Iterator[str]:
    """A value, and what a message may show of it: its parts, in other cases, quoted."""
    match value:
        case bytes():
            yield from _spellings(value.decode(errors="backslashreplace"))
        case str():
            for part in (value, repr(value)[1:-1], *re.findall(r"\w+", value)):
                yield from (part, part.lower(), part.upper())
        case int() | float() | Decimal():
            yield from (f"{value:,}", f"{value:,.2f}")
        case dt.datetime():
            yield from (value.isoformat(), str(value.date()), str(value.time()))
    yield from (str(value), repr(value))
