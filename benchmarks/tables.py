"""The rows that the benchmarks read: three kinds of tables, made up once and repeated.

A table's name tells its kind and its rows, as `numeric_100000000` does. What is sent of it is one
record batch, serialized when it is first asked for, over and over; the last of a stream is shorter.
So `id` counts from 0 anew in every message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa

NUMERIC, MIXED, TEXT = "numeric", "mixed", "text"
FLOATS = tuple(f"f{number}" for number in range(7))
INTEGERS = tuple(f"i{number}" for number in range(3))
FEATURES = {
    NUMERIC: (*FLOATS, *INTEGERS),
    MIXED: ("age", "visits", "score", "amount", "city", "product", "member", "rating"),
    TEXT: ("text",),
}

MESSAGE_BYTES = 1_000_000

_NAME = re.compile(rf"({NUMERIC}|{MIXED}|{TEXT})_(\d+)")
_SAMPLE_ROWS = 1000
_CITIES = ("Bergen", "Porto", "Gdańsk", "Lyon", "Turku", "Ghent", "Brno", "Graz", "Cork", "Bari")
_WORDS = """
    the quick service answered my call within an hour but the parcel came late and wet so I sent
    it back twice before anyone looked at it which was a pity since the colour is lovely
"""


@dataclass(frozen=True)
class Shape:
    """What a table's name says."""

    kind: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.rows}"


def shape_of(table: str) -> Shape | None:
    """The shape of the table of this name; None for another table."""
    told = _NAME.fullmatch(table)
    return Shape(told[1], int(told[2])) if told else None


def schema(kind: str) -> pa.Schema:
    return made_up(kind, 1).schema


def made_up(kind: str, rows: int) -> pa.RecordBatch:
    """So many rows of a kind of table, the same ones each time."""
    rng = np.random.default_rng(0)
    columns = {"id": pa.array(np.arange(rows))}
    columns |= {NUMERIC: _numeric, MIXED: _mixed, TEXT: _text}[kind](rng, rows)
    return pa.record_batch(columns)


def _numeric(rng: np.random.Generator, rows: int) -> dict[str, pa.Array]:
    floats = {name: pa.array(rng.normal(size=rows)) for name in FLOATS}
    return floats | {name: pa.array(rng.integers(0, 1000, rows)) for name in INTEGERS}


def _mixed(rng: np.random.Generator, rows: int) -> dict[str, pa.Array]:
    def some(values: np.ndarray, share: float) -> pa.Array:
        return pa.array(values, mask=rng.random(rows) < share)

    def one_of(words: Sequence[str], share: float = 0.0) -> pa.Array:
        picked = pa.array(rng.integers(0, len(words), rows), mask=rng.random(rows) < share)
        return pa.array(words).take(picked)

    seconds = rng.integers(1_500_000_000, 1_700_000_000, rows)
    return {
        "age": some(rng.integers(18, 90, rows), 0.1),
        "visits": pa.array(rng.poisson(3, rows)),
        "score": some(rng.normal(size=rows), 0.05),
        "amount": pa.array(rng.exponential(100, rows)),
        "city": one_of(_CITIES, 0.02),
        "product": one_of([f"product {number}" for number in range(200)]),
        "member": some(rng.random(rows) < 0.5, 0.1),
        "rating": some(rng.integers(1, 6, rows), 0.3),
        "comment": one_of([" ".join(rng.choice(_WORDS.split(), 4)) for _ in range(500)], 0.2),
        "seen_at": pa.array(seconds * 1_000_000).cast(pa.timestamp("us", "UTC")),
    }


def _text(rng: np.random.Generator, rows: int) -> dict[str, pa.Array]:
    texts = [" ".join(rng.choice(_WORDS.split(), size)) for size in rng.integers(5, 25, 2000)]
    return {"text": pa.array(texts).take(pa.array(rng.integers(0, len(texts), rows)))}


@cache
def message(kind: str, columns: tuple[str, ...], size: int = MESSAGE_BYTES) -> pa.RecordBatch:
    """The batch that is sent over and over: about `size` bytes of these columns.

    Args:
        columns: all where empty; the batch has them in the table's order.
    """
    sample = _project(made_up(kind, _SAMPLE_ROWS), columns)
    a_row = pa.ipc.get_record_batch_size(sample) / _SAMPLE_ROWS
    return _project(made_up(kind, max(1, int(size / a_row))), columns)


def _project(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    return batch.select([name for name in batch.schema.names if not columns or name in columns])
