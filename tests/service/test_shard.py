"""Shards that have appended other rows than were read are found out."""

from __future__ import annotations

import math

import anyio
import pyarrow as pa
import pytest

from mlsys.errors import IntegrityError
from service.shard import run_shards
from service.source import Source, Sources

pytestmark = pytest.mark.anyio


async def test_rows_that_were_read_and_not_appended_end_the_run() -> None:
    sent, received = anyio.create_memory_object_stream[pa.RecordBatch](math.inf)
    with sent, received:
        few, many = Source(received, 0), Source(received, 1)
        few.end(2)
        many.end(1000)

        with pytest.raises(IntegrityError, match="1,002 rows were read but 0 appended"):
            await run_shards([], Sources([few, many]), means=None)
