"""Chunks: every row once, of one size, and the same bytes."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pyarrow as pa
import pytest

from mlsys.chunk import Rechunker
from tests.mlsys.storage_server import id_list, ids


def rechunked(batches: Iterable[pa.RecordBatch], rows: int) -> list[pa.Table]:
    rechunker = Rechunker(rows)
    chunks = [chunk for batch in batches for chunk in rechunker.push(batch)]
    return [*chunks, *rechunker.rest()]


def addresses(table: pa.Table) -> set[int]:
    return {
        buffer.address
        for column in table.columns
        for part in column.chunks
        for buffer in part.buffers()
        if buffer is not None
    }


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        ([10], 10, [10]),
        ([10], 3, [3, 3, 3, 1]),
        ([3, 3, 3], 10, [9]),
        ([3, 3, 3], 9, [9]),
        ([5, 5], 1, [1] * 10),
        ([0, 4, 0, 0, 4, 0], 4, [4, 4]),
        ([1] * 7, 3, [3, 3, 1]),
        ([0, 0], 5, []),
        ([], 5, []),
    ],
)
def test_chunks_have_the_size_that_was_asked_for(
    sizes: list[int], rows: int, expected: list[int]
) -> None:
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    batches = [ids(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    chunks = rechunked(batches, rows)

    assert [chunk.num_rows for chunk in chunks] == expected
    assert id_list(chunks) == list(range(sum(sizes)))


def test_every_row_comes_once_and_in_order_however_the_batches_fall() -> None:
    dice = random.Random(20260301)
    for _ in range(300):
        sizes = [dice.choice([0, 1, 2, dice.randrange(200)]) for _ in range(dice.randrange(12))]
        rows = dice.choice([1, 2, 7, 64, 100, 1000])
        total, batches = 0, []
        for size in sizes:
            batches.append(ids(total, total + size))
            total += size
        chunks = rechunked(batches, rows)

        assert id_list(chunks) == list(range(total)), (sizes, rows)
        assert all(chunk.num_rows == rows for chunk in chunks[:-1]), (sizes, rows)
        assert all(0 < chunk.num_rows <= rows for chunk in chunks), (sizes, rows)


def test_a_chunk_is_made_of_the_very_buffers_of_its_batches() -> None:
    text = pa.array([f"row {n}" for n in range(100)])
    batches = [
        pa.record_batch({"text": text, "id": pa.array(range(100), pa.int64())}) for _ in range(3)
    ]
    before = pa.total_allocated_bytes()
    chunks = rechunked(batches, 70)

    assert pa.total_allocated_bytes() == before
    known = set().union(*(addresses(pa.table(batch)) for batch in batches))
    assert all(addresses(chunk) <= known for chunk in chunks)
    assert [len(chunk.column("id").chunks) for chunk in chunks] == [1, 2, 2, 1, 1]


def test_many_batches_of_a_row_are_put_together() -> None:
    # A row beside them that is large by itself is not copied.
    large = pa.record_batch({"id": pa.array(range(10_000, 210_000), pa.int64())})
    batches = [*(ids(n, n + 1) for n in range(1000)), large, *(ids(n, n + 1) for n in range(1000))]

    [chunk] = rechunked(batches, 202_000)

    assert id_list([chunk]) == [*range(1000), *range(10_000, 210_000), *range(1000)]
    assert len(chunk.column("id").chunks) < 200
    assert addresses(pa.table(large)) <= addresses(chunk)


def test_chunks_keep_the_schema() -> None:
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False)], metadata={"a": "b"})
    batch = pa.record_batch([pa.array([1, 2, 3], pa.int64())], schema=schema)

    assert all(chunk.schema.equals(schema, check_metadata=True) for chunk in rechunked([batch], 2))


def test_a_full_chunk_is_given_before_the_next_batch_is_taken() -> None:
    rechunker = Rechunker(4)

    assert list(rechunker.push(ids(0, 3))) == []
    [chunk] = rechunker.push(ids(3, 6))
    assert id_list([chunk]) == [0, 1, 2, 3]


def test_nothing_is_held_after_the_rest() -> None:
    rechunker = Rechunker(4)
    before = pa.total_allocated_bytes()
    assert list(rechunker.push(ids(0, 3))) == []
    assert id_list(rechunker.rest()) == [0, 1, 2]

    assert list(rechunker.rest()) == []
    assert pa.total_allocated_bytes() == before
    assert id_list(rechunker.push(ids(7, 11))) == [7, 8, 9, 10]
