"""Record batches of any size, sliced anew into chunks of one size, without copying."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa


class Rechunker:
    """Takes batches as they come and gives chunks of `rows` rows, which may change on the way.

    A chunk is a table of slices of the batches it was made from: zero-copy, and it keeps those
    batches in memory until it is dropped.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: list[pa.RecordBatch] = []
        self._held_rows = 0

    def push(self, batch: pa.RecordBatch) -> Iterator[pa.Table]:
        """Adds a batch; yields every chunk that is full."""
        while self._held_rows + batch.num_rows >= self.rows:
            missing = max(self.rows - self._held_rows, 0)
            self._held.append(batch.slice(0, missing))
            yield self._take()
            batch = batch.slice(missing)
        if batch.num_rows:
            self._held.append(batch)
            self._held_rows += batch.num_rows

    def rest(self) -> Iterator[pa.Table]:
        """Yields the last, shorter chunk, where there is one."""
        if self._held:
            yield self._take()

    def _take(self) -> pa.Table:
        chunk = pa.Table.from_batches(self._held)
        self._held, self._held_rows = [], 0
        return chunk
