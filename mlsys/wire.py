"""The two messages that carry rows, put together and taken apart as bytes.

They are almost all rows, one field of megabytes. protobuf copies it into its message and out again:
for a model that is quick, as much work as predicting. What the fields are is read from Google's own
descriptors, what they look like is in https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pyarrow as pa
from google.cloud.bigquery_storage_v1 import types

_APPEND = types.AppendRowsRequest.pb()
_DATA = types.AppendRowsRequest.ArrowData.pb()
_RESPONSE = types.ReadRowsResponse.pb()
_BATCH = types.ArrowRecordBatch.pb()

# Wire types: a number, and what is preceded by its length; the others are of fixed length.
_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}
# Of the buffers in a serialized record batch, at least:
# https://arrow.apache.org/docs/format/Columnar.html#recordbatch-message
_ALIGNMENT = 8


def append_request(stream: str, offset: int, rows: bytes | pa.Buffer, schema: bytes = b"") -> bytes:
    """A serialized AppendRowsRequest.

    Args:
        rows: a serialized record batch, copied once.
        schema: serialized, for the first request of a connection.
    """
    request = _APPEND(write_stream=stream)
    request.offset.value = offset
    data = _DATA()
    if schema:
        data.writer_schema.serialized_schema = schema
    batch_head = _head(_BATCH, "serialized_record_batch", len(rows))
    rows_head = _head(_DATA, "rows", len(batch_head) + len(rows))
    told = data.SerializeToString()
    length = len(told) + len(rows_head) + len(batch_head) + len(rows)
    data_head = _head(_APPEND, "arrow_rows", length)
    return b"".join([request.SerializeToString(), data_head, told, rows_head, batch_head, rows])


def rows_of(response: bytes) -> pa.Buffer:
    """The serialized record batch of a serialized ReadRowsResponse; empty: none.

    Not copied where it begins at a multiple of 8 bytes, as its numbers then do: Arrow would read
    them anywhere, but a model may be given them as they are.

    Raises:
        google.protobuf.message.DecodeError: it is no such message.
    """
    try:
        whole = memoryview(response)
        if _all(whole, _RESPONSE, "avro_rows"):
            raise ValueError("rows of another format, in the place of these or before them")
        batch = _only(whole, _RESPONSE, "arrow_record_batch")
        rows = pa.py_buffer(_only(batch, _BATCH, "serialized_record_batch"))
        return rows if rows.address % _ALIGNMENT == 0 else pa.py_buffer(rows.to_pybytes())
    except (LookupError, ValueError):
        # Written in a way that no server was seen to use; or broken, which protobuf says better.
        message = _RESPONSE.FromString(response)
        return pa.py_buffer(message.arrow_record_batch.serialized_record_batch)


def _head(message: type, field: str, length: int) -> bytes:
    """What precedes a field: its number, its wire type and its length."""
    return _varint(_number(message, field) << 3 | _DELIMITED) + _varint(length)


@cache
def _number(message: type, field: str) -> int:
    return message.DESCRIPTOR.fields_by_name[field].number


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _only(data: memoryview, message: type, field: str) -> memoryview:
    """A field that may be there once; nothing where it is not there.

    Raises:
        LookupError, ValueError: it is there more than once, or `data` is not a message.
    """
    found = _all(data, message, field)
    if len(found) > 1:
        raise ValueError(f"several fields {field}")
    return found[0] if found else data[:0]


def _all(data: memoryview, message: type, field: str) -> list[memoryview]:
    wanted = (_number(message, field), _DELIMITED)
    return [value for number, kind, value in fields(data) if (number, kind) == wanted]


def fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """The fields of a message: number, wire type and value, an int or a view of its bytes.

    Raises:
        LookupError, ValueError: `data` is not a message, or has groups, which are long out of use.
    """
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        length, at = _read_varint(data, at) if kind in (_VARINT, _DELIMITED) else (_FIXED[kind], at)
        if kind == _VARINT:
            yield number, kind, length
            continue
        if at + length > len(data):
            raise ValueError("a field goes beyond its message")
        yield number, kind, data[at : at + length]
        at += length


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
