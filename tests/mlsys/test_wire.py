"""Messages that carry rows: what protobuf makes of ours, and what we make of protobuf's."""

from __future__ import annotations

from contextlib import suppress

import pyarrow as pa
import pytest
from google.cloud.bigquery_storage_v1 import types
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from mlsys.wire import append_request, rows_of

STREAM = "projects/p/datasets/d/tables/t/streams/s"
LENGTHS = [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152]


def response_of(rows: bytes, **fields: object) -> bytes:
    response = types.ReadRowsResponse.pb()(**fields)
    response.arrow_record_batch.serialized_record_batch = rows
    return response.SerializeToString()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("schema", [b"", b"schema", b"s" * 300])
@pytest.mark.parametrize("offset", [0, 1, 2**40])
def test_an_append_is_the_message_that_protobuf_makes(
    length: int, schema: bytes, offset: int
) -> None:
    rows = b"r" * length
    expected = types.AppendRowsRequest.pb()(write_stream=STREAM)
    expected.offset.value = offset
    expected.arrow_rows.rows.serialized_record_batch = rows
    if schema:
        expected.arrow_rows.writer_schema.serialized_schema = schema

    request = append_request(STREAM, offset, pa.py_buffer(rows), schema)

    told = types.AppendRowsRequest.pb().FromString(request)
    assert told == expected
    assert told.HasField("offset")


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_found_in_the_message_that_protobuf_makes(length: int) -> None:
    rows = bytes(range(256)) * (length // 256) + b"r" * (length % 256)
    assert rows_of(response_of(rows)) == rows


def test_rows_are_found_among_all_else_that_a_response_tells() -> None:
    response = types.ReadRowsResponse.pb()(row_count=2**40, uncompressed_byte_size=3)
    response.arrow_record_batch.serialized_record_batch = b"rows"
    response.arrow_record_batch.row_count = 7
    response.stats.progress.at_response_end = 0.5
    response.throttle_state.throttle_percent = 20
    response.arrow_schema.serialized_schema = b"schema"

    assert rows_of(response.SerializeToString()) == b"rows"


@pytest.mark.parametrize("before", range(9))
def test_rows_begin_where_numbers_may_and_are_copied_only_for_that(before: int) -> None:
    # A field that nobody knows, of so many bytes.
    unknown = b"\xfa\x07" + bytes([before]) + b"u" * before
    rows = b"r" * 100_000
    response = unknown + response_of(rows)
    place = len(response) - len(rows)

    found = rows_of(response)

    assert found == rows
    assert found.address % 8 == 0
    in_place = found.address - pa.py_buffer(response).address == place
    assert in_place == (place % 8 == 0)


@pytest.mark.parametrize("unknown", [b"\xf8\x07\x05", b"\xfa\x07\x02ab", b"\xf9\x07" + b"x" * 8])
def test_fields_of_a_newer_server_are_passed_over(unknown: bytes) -> None:
    assert rows_of(unknown + response_of(b"rows") + unknown) == b"rows"


def test_a_response_without_rows_has_none() -> None:
    assert rows_of(b"") == b""
    assert rows_of(types.ReadRowsResponse.pb()(row_count=3).SerializeToString()) == b""


def test_rows_of_another_format_take_the_place_of_those_before_them() -> None:
    other = types.ReadRowsResponse.pb()()
    other.avro_rows.serialized_binary_rows = b"avro"

    assert rows_of(response_of(b"rows") + other.SerializeToString()) == b""
    assert rows_of(other.SerializeToString() + response_of(b"rows")) == b"rows"


def test_what_is_written_in_parts_is_put_together_as_protobuf_does() -> None:
    assert rows_of(response_of(b"first") + response_of(b"last")) == b"last"


@given(
    st.binary(max_size=50) | st.binary(max_size=9).map(lambda cut: response_of(b"rows")[:-1] + cut)
)
def test_whatever_protobuf_reads_is_read_alike_and_all_else_is_refused_or_read(data: bytes) -> None:
    try:
        message = types.ReadRowsResponse.pb().FromString(data)
    except DecodeError:
        # Fields that are of no interest are not looked into, so what is wrong in them goes unseen.
        with suppress(DecodeError):
            assert isinstance(rows_of(data), pa.Buffer)
    else:
        assert rows_of(data) == message.arrow_record_batch.serialized_record_batch
