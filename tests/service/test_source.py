"""The rows of read streams go to whoever asks for them: each once, and with its place."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import anyio
import anyio.lowlevel
import pyarrow as pa
import pytest

from service.source import Chunk, Source, Sources
from tests.mlsys.storage_server import ids

pytestmark = pytest.mark.anyio


@contextmanager
def source_of(*batches: pa.RecordBatch, number: int = 3) -> Iterator[Source]:
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    with received:
        with sent:
            for batch in batches:
                sent.send_nowait(batch)
        yield Source(received, number)


async def test_chunks_follow_each_other_and_the_last_is_what_is_left() -> None:
    with source_of(ids(0, 5), ids(5, 5), ids(5, 9)) as source:
        assert await source.chunk(4) == Chunk(3, 0, pa.table(ids(0, 4)))
        # Of as many rows as are asked for this time.
        assert await source.chunk(2) == Chunk(3, 4, pa.table(ids(4, 6)))
        assert await source.chunk(100) == Chunk(3, 6, pa.table(ids(6, 9)))
        assert await source.chunk(100) is None
        assert await source.chunk(1) is None


async def test_without_rows_there_is_no_chunk() -> None:
    with source_of(ids(0, 0)) as of_no_rows, source_of() as of_nothing:
        assert await of_no_rows.chunk(1) is None
        assert await of_nothing.chunk(1) is None


async def test_what_was_peeked_at_is_in_the_next_chunk() -> None:
    with source_of(ids(0, 0), ids(0, 3), ids(3, 4)) as source:
        assert await source.peek() == await source.peek() == ids(0, 3)
        assert await source.chunk(10) == Chunk(3, 0, pa.table(ids(0, 4)))


async def test_nothing_to_peek_at_is_told() -> None:
    with source_of(ids(0, 0)) as source, pytest.raises(anyio.EndOfStream):
        await source.peek()


async def test_rows_go_to_one_of_those_who_ask_at_once() -> None:
    dice = random.Random(20261128)
    sizes = [dice.choice([0, 1, 3, 50]) for _ in range(100)]
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    batches = [ids(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    taken: list[Chunk] = []

    async def take(source: Source) -> None:
        while (chunk := await source.chunk(dice.randrange(1, 40))) is not None:
            taken.append(chunk)
            await anyio.sleep(dice.choice([0, 0.0005]))

    with source_of(*batches) as source:
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(take, source)

    assert len(taken) > 20
    for chunk in taken:
        first, rows = chunk.first_row, chunk.rows.num_rows
        assert chunk.rows["id"].to_pylist() == list(range(first, first + rows))
    assert sorted(n for each in taken for n in each.rows["id"].to_pylist()) == list(range(ends[-1]))


async def test_who_is_cancelled_while_waiting_leaves_the_rows_to_others() -> None:
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    with sent, received:
        source = Source(received, 3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(source.chunk, 4)
            await anyio.wait_all_tasks_blocked()
            sent.send_nowait(ids(0, 3))
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        sent.send_nowait(ids(3, 5))

        assert await source.chunk(4) == Chunk(3, 0, pa.table(ids(0, 4)))


async def test_how_many_rows_were_read_is_known_at_the_end() -> None:
    told = []

    async def ask(source: Source) -> None:
        told.append(await source.rows())

    with source_of() as source:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, source)
            await anyio.wait_all_tasks_blocked()
            assert told == []
            source.end(7)
    assert told == [7]


@contextmanager
def sources_of(*streams: list[pa.RecordBatch]) -> Iterator[Sources]:
    with ExitStack() as opened:
        yield Sources(
            [
                opened.enter_context(source_of(*batches, number=number))
                for number, batches in enumerate(streams)
            ]
        )


async def test_a_stream_is_asked_first_for_as_long_as_it_has_rows() -> None:
    with sources_of([ids(0, 2)], [ids(2, 4), ids(4, 5)], [ids(5, 6)]) as sources:
        # Numbers go round, as there may be more of those who ask than streams.
        assert await sources.chunk(2, first=4) == Chunk(1, 0, pa.table(ids(2, 4)))
        assert await sources.chunk(2, first=1) == Chunk(1, 2, pa.table(ids(4, 5)))
        assert await sources.chunk(2, first=1) == Chunk(2, 0, pa.table(ids(5, 6)))
        assert await sources.chunk(1, first=1) == Chunk(0, 0, pa.table(ids(0, 1)))
        assert await sources.chunk(1, first=0) == Chunk(0, 1, pa.table(ids(1, 2)))
        for first in range(3):
            assert await sources.chunk(1, first=first) is None


async def test_who_begins_with_a_stream_of_few_rows_goes_on_with_the_others() -> None:
    taken: list[Chunk] = []
    many = [ids(start, start + 10) for start in range(0, 1000, 10)]

    async def take(sources: Sources, first: int) -> None:
        count = 0
        while (chunk := await sources.chunk(7, first=first)) is not None:
            taken.append(chunk)
            count += 1
            await anyio.lowlevel.checkpoint()
        assert count > 30

    with sources_of([], many, []) as sources:
        async with anyio.create_task_group() as tasks:
            for first in range(3):
                tasks.start_soon(take, sources, first)

    assert {chunk.stream for chunk in taken} == {1}
    assert sorted(n for each in taken for n in each.rows["id"].to_pylist()) == list(range(1000))


async def test_what_is_peeked_at_is_of_the_first_stream_that_has_rows() -> None:
    with sources_of([], [ids(0, 0)], [ids(0, 3)]) as sources:
        await sources.look()
        assert await sources.peek() == await sources.peek() == ids(0, 3)
        assert await sources.chunk(3, first=0) == Chunk(2, 0, pa.table(ids(0, 3)))
    with sources_of([ids(0, 0)], []) as none, pytest.raises(anyio.EndOfStream):
        await none.look()
        await none.peek()
    with sources_of() as none, pytest.raises(anyio.EndOfStream):
        await none.look()
        await none.peek()


async def test_nobody_waits_for_a_slow_stream_where_another_has_rows() -> None:
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    later: list[Chunk | None] = []

    async def take(sources: Sources) -> None:
        later.append(await sources.chunk(5, first=0))

    with sent, received, source_of(ids(0, 2), ids(2, 4), number=1) as quick:
        sources = Sources([Source(received, 0), quick])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sources.look)
            with anyio.fail_after(5):
                assert await sources.peek() == ids(0, 2)
                # The slow one is still looked at.
                assert await sources.chunk(2, first=0) == Chunk(1, 0, pa.table(ids(0, 2)))
                assert await sources.chunk(2, first=0) == Chunk(1, 2, pa.table(ids(2, 4)))
                tasks.start_soon(take, sources)
                await anyio.wait_all_tasks_blocked()
                assert later == []
                sent.send_nowait(ids(4, 6))
                sent.close()

    assert later == [Chunk(0, 0, pa.table(ids(4, 6)))]


async def test_who_waits_for_a_stream_holds_up_nobody_else() -> None:
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    with sent, received, source_of(ids(0, 2), number=1) as quick:
        sources = Sources([Source(received, 0), quick])
        async with anyio.create_task_group() as tasks:
            sent.send_nowait(ids(2, 3))
            tasks.start_soon(partial(sources.chunk, 4, first=0))
            await anyio.wait_all_tasks_blocked()
            # One row of the first stream has come, and who waits for more has it.
            sent.send_nowait(ids(3, 4))
            with anyio.fail_after(5):
                assert await sources.chunk(2, first=0) == Chunk(1, 0, pa.table(ids(0, 2)))
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("batch_rows", [1, 3, 50])
async def test_chunks_of_large_rows_have_fewer(batch_rows: int) -> None:
    row_bytes, most_bytes, rows = 10_000, 45_000, 50
    values = ["x" * row_bytes] * rows
    table = pa.table({"id": range(rows), "text": values})
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    with received:
        with sent:
            for batch in table.to_batches(max_chunksize=batch_rows):
                sent.send_nowait(batch)
        source = Source(received, most_bytes=most_bytes)
        chunks = []
        while (chunk := await source.chunk(2048)) is not None:
            chunks.append(chunk)

    assert {chunk.rows.num_rows for chunk in chunks} == {4, 2}
    assert all(chunk.rows.nbytes <= most_bytes for chunk in chunks)
    assert pa.concat_tables([chunk.rows for chunk in chunks]).equals(table)
    assert [chunk.first_row for chunk in chunks] == list(range(0, rows, 4))


async def test_a_row_that_is_larger_than_a_chunk_is_one() -> None:
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    with received:
        with sent:
            sent.send_nowait(pa.record_batch({"text": ["x" * 1000] * 3}))
        source = Source(received, most_bytes=10)
        for number in range(3):
            chunk = await source.chunk(2)
            assert (chunk.first_row, chunk.rows.num_rows) == (number, 1)
