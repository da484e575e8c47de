"""Aggregated records of the Kinesis Producer Library, which hold many messages.

    F3 89 9A C2 │ AggregatedRecord (protobuf) │ MD5 of it, 16 bytes

Format: amazon-kinesis-producer, aggregation-format.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

_MAGIC = b"\xf3\x89\x9a\xc2"
_DIGEST_BYTES = 16

# The fields that are read; the others (explicit hash keys, tags) do not affect a message. A key is declared as bytes,
# because a string of proto2 need not be UTF-8.
_FORMAT = """
name: "shoal/kinesis_producer_library.proto"
package: "shoal.kinesis_producer_library"
syntax: "proto2"
message_type {
  name: "AggregatedRecord"
  field { name: "partition_key_table" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
  field { name: "records" number: 3 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Record" }
}
message_type {
  name: "Record"
  field { name: "partition_key_index" number: 1 label: LABEL_REQUIRED type: TYPE_UINT64 }
  field { name: "data" number: 3 label: LABEL_REQUIRED type: TYPE_BYTES }
}
"""


def _message_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    file = pool.AddSerializedFile(text_format.Parse(_FORMAT, descriptor_pb2.FileDescriptorProto()).SerializeToString())
    return message_factory.GetMessageClass(file.message_types_by_name["AggregatedRecord"])


_AggregatedRecord = _message_class()


class AggregatedMessages:
    """Messages of one record: (partition key, value) of each, in order."""

    def __init__(self, record: Any) -> None:
        self._record = record

    def __len__(self) -> int:
        return len(self._record.records)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        keys = self._record.partition_key_table
        for each in self._record.records:
            yield keys[each.partition_key_index], each.data


def unpack(data: bytes) -> AggregatedMessages | None:
    """Return the messages of an aggregated record. None for any other record, even with the same first bytes."""
    if not data.startswith(_MAGIC):
        return None
    body, digest = data[len(_MAGIC) : -_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.md5(body, usedforsecurity=False).digest() != digest:
        return None
    record = _AggregatedRecord()
    try:
        record.ParseFromString(body)
    except DecodeError:
        return None
    if any(each.partition_key_index >= len(record.partition_key_table) for each in record.records):
        return None
    return AggregatedMessages(record)
