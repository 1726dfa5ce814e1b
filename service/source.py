"""The rows of read streams, as chunks for whoever asks for the next one."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio
import pyarrow as pa
from anyio.abc import ObjectReceiveStream

from mlsys.chunk import Rechunker
from mlsys.tasks import task_group

# What a value takes in an array of floats, or as a reference to an object.
_VALUE_BYTES = 8


def size_of(rows: pa.Table | pa.RecordBatch) -> int:
    """Bytes of rows, in Arrow or as a model gets them, if that is more: booleans are bits here."""
    return max(rows.nbytes, _VALUE_BYTES * rows.num_rows * rows.num_columns)


@dataclass(frozen=True)
class Chunk:
    """Rows that follow each other in a read stream, the first of which is its `first_row`.

    `stream` is the number of the stream in the run.
    """

    stream: int
    first_row: int
    rows: pa.Table


# Gives the next so many rows, or as many as there are left; None: there are none.
type NextChunk = Callable[[int], Awaitable[Chunk | None]]


class Source:
    """A read stream that is being read. Several may take its chunks: each goes to one of them.

    Args:
        batches: what is read, which is closed by whoever opened it: a stage that fails would break
            the reader off, and be heard after it.
        number: of the stream among those of the run.
        most_bytes: of a chunk, by the average row of its last batch.
    """

    def __init__(
        self,
        batches: ObjectReceiveStream[pa.RecordBatch],
        number: int = 0,
        *,
        most_bytes: int = sys.maxsize,
    ) -> None:
        self._number = number
        self._batches = batches
        self._peeked: pa.RecordBatch | None = None
        self._most_bytes = most_bytes
        self._most_rows = sys.maxsize
        self._rechunker = Rechunker(1)
        self._chunks: Iterator[pa.Table] = iter(())
        self._at_end = False
        self._first_row = 0
        self._turn = anyio.Lock(fast_acquire=True)
        self._rows = 0
        self._ended = anyio.Event()

    async def peek(self) -> pa.RecordBatch:
        """The next batch that has rows, which stays the next. Before any chunk is taken.

        Raises:
            anyio.EndOfStream: there is none.
        """
        async with self._turn:
            while self._peeked is None or not self._peeked.num_rows:
                self._peeked = await self._batches.receive()
            return self._peeked

    @property
    def ready(self) -> bool:
        """Whether rows have come for which nobody waits."""
        sent = self._batches.statistics()
        here = self._peeked is not None or sent.tasks_waiting_send or sent.current_buffer_used
        return bool(here) and not self._turn.statistics().locked

    async def chunk(self, rows: int) -> Chunk | None:
        """The next so many rows, or as many as there are left or may be; None: there are none.

        Where another's call was cancelled, as many as it had asked for.
        """
        async with self._turn:
            self._rechunker.rows = min(rows, self._most_rows)
            while (chunk := next(self._chunks, None)) is None:
                if self._at_end:
                    return None
                try:
                    batch = await self._receive()
                except anyio.EndOfStream:
                    self._at_end, self._chunks = True, self._rechunker.rest()
                    continue
                if batch.num_rows:
                    self._most_rows = max(
                        1, self._most_bytes * batch.num_rows // max(size_of(batch), 1)
                    )
                self._rechunker.rows = min(rows, self._most_rows)
                self._chunks = self._rechunker.push(batch)
            first_row = self._first_row
            self._first_row += chunk.num_rows
            return Chunk(self._number, first_row, chunk)

    async def _receive(self) -> pa.RecordBatch:
        if self._peeked is None:
            return await self._batches.receive()
        batch, self._peeked = self._peeked, None
        return batch

    def end(self, rows: int) -> None:
        """Tells how many rows were read, when all are."""
        self._rows = rows
        self._ended.set()

    async def rows(self) -> int:
        """How many rows were read, once all are."""
        await self._ended.wait()
        return self._rows


class Sources:
    """All read streams of a run, which ends when the last of them does."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._first: Source | None = None
        self._looked = anyio.Event()

    def __len__(self) -> int:
        return len(self._sources)

    async def look(self) -> None:
        """Waits for the first rows of every stream; `peek` waits until one has some."""

        async def look(source: Source) -> None:
            with suppress(anyio.EndOfStream):
                await source.peek()
                self._first = self._first or source
                self._looked.set()

        async with task_group() as tasks:
            for source in self._sources:
                tasks.start_soon(look, source)
        self._looked.set()

    async def peek(self) -> pa.RecordBatch:
        """The first batch that comes, while somebody looks. It stays the next of its stream.

        Raises:
            anyio.EndOfStream: there is none.
        """
        await self._looked.wait()
        if self._first is None:
            raise anyio.EndOfStream
        return await self._first.peek()

    async def chunk(self, rows: int, *, first: int) -> Chunk | None:
        """The next so many rows of a stream, or as many as it has left; None: there are none.

        Args:
            first: the number of the stream that is asked first. Where it has no rows at hand the
                others are, in their order: BigQuery may give one most of them, or be slow with one.
        """
        turn = [self._sources[(first + number) % len(self)] for number in range(len(self))]
        for source in sorted(turn, key=lambda source: not source.ready):
            if (chunk := await source.chunk(rows)) is not None:
                return chunk
        return None

    async def rows(self) -> int:
        """How many rows were read, once all are."""
        return sum([await source.rows() for source in self._sources])
