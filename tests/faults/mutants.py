"""Mutants: the protocol with a step left out, to see whether the tests would tell.

A mutant is the service as it is, but for one thing that a careless change might do to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import service.once
import service.pipeline
from service.contract import RunState
from service.journal import Entry


@contextmanager
def without_fence() -> Iterator[None]:
    """Step 5 is left out: an owner commits without asking whether the record is his still."""
    owner = service.once._Owner
    fenced = owner.write

    async def write(self: Any, **changes: Any) -> None:
        if changes.get("state") is RunState.PREPARED:
            record = self.record.model_copy(update=changes)
            self._entry = Entry(record, self._entry.generation)
        else:
            await fenced(self, **changes)

    owner.write = write
    try:
        yield
    finally:
        owner.write = fenced


@contextmanager
def gone_is_not_committed() -> Iterator[None]:
    """Step 6 does not look for the rows where the streams are gone: there are none, it says."""
    looks = service.pipeline.count_rows

    async def count_rows(*args: Any, **more: Any) -> int:
        return 0

    service.pipeline.count_rows = count_rows
    try:
        yield
    finally:
        service.pipeline.count_rows = looks


MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "without-fence": without_fence,
    "gone-is-not-committed": gone_is_not_committed,
}


def mutated(name: str) -> AbstractContextManager[None]:
    """This process as the mutant of that name, for as long as the block lasts; "": as it is."""
    return MUTANTS[name]()
