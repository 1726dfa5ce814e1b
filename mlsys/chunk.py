"""Record batches of any size, sliced anew into chunks of one size, without copying."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

# Of batches of a few rows, which a filter may leave, each takes far more than its values: some 500
# bytes a column. So many of them that are no more than so large are put together.
_MANY, _SMALL_BYTES = 64, 2**20


class Rechunker:
    """Takes batches as they come and gives chunks of `rows` rows, which may change on the way.

    A chunk is a table of slices of the batches it was made from: zero-copy but for many small ones,
    and it keeps those batches in memory until it is dropped.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: list[pa.RecordBatch] = []
        self._held_rows = 0
        self._packed = 0

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
            self._pack()

    def rest(self) -> Iterator[pa.Table]:
        """Yields the last, shorter chunk, where there is one."""
        if self._held:
            yield self._take()

    def _take(self) -> pa.Table:
        chunk = pa.Table.from_batches(self._held)
        self._held, self._held_rows, self._packed = [], 0, 0
        return chunk

    def _pack(self) -> None:
        if len(self._held) - self._packed < _MANY:
            return
        latest = self._held[self._packed :]
        if sum(batch.nbytes for batch in latest) < _SMALL_BYTES:
            self._held[self._packed :] = [pa.concat_batches(latest)]
        self._packed = len(self._held)
