"""Messages of Envoy's rate limit quota service, as classes of google.protobuf.

Envoy reports all buckets every 5 s. envoy-data-plane takes 340 us to parse one, which would hold the event loop for
seconds; these classes take 1 us. They have the fields that Shoal uses. Source of the numbers:
envoy/service/rate_limit_quota/v3/rlqs.proto, envoy/type/v3/ratelimit_strategy.proto, envoy/type/v3/token_bucket.proto.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory, wrappers_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

_PACKAGE = "shoal.envoy.quota"
_DURATION, _UINT32 = ".google.protobuf.Duration", ".google.protobuf.UInt32Value"

# Fields of each message: name, number, type; a text is the type of a message, and a list begins with `repeated`.
_MESSAGES: dict[str, list[tuple[str, int, str]]] = {
    "Entry": [("key", 1, "string"), ("value", 2, "string")],
    # On the wire, a map is a list of entries.
    "BucketId": [("bucket", 1, "repeated Entry")],
    "Usage": [
        ("bucket_id", 1, "BucketId"),
        ("num_requests_allowed", 3, "uint64"),
        ("num_requests_denied", 4, "uint64"),
    ],
    "Reports": [("domain", 1, "string"), ("bucket_quota_usages", 2, "repeated Usage")],
    "TokenBucket": [("max_tokens", 1, "uint32"), ("tokens_per_fill", 2, _UINT32), ("fill_interval", 3, _DURATION)],
    "Strategy": [("blanket_rule", 1, "oneof int32"), ("token_bucket", 3, "oneof TokenBucket")],
    "Assignment": [("assignment_time_to_live", 2, _DURATION), ("rate_limit_strategy", 3, "Strategy")],
    "Abandon": [],
    "Action": [
        ("bucket_id", 1, "BucketId"),
        ("quota_assignment_action", 2, "oneof Assignment"),
        ("abandon_action", 3, "oneof Abandon"),
    ],
    "Response": [("bucket_action", 1, "repeated Action")],
}
_SCALARS = {"string": Field.TYPE_STRING, "uint64": Field.TYPE_UINT64, "uint32": Field.TYPE_UINT32}
_SCALARS["int32"] = Field.TYPE_INT32


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="shoal/envoy/quota.proto", package=_PACKAGE, syntax="proto3")
    pool = descriptor_pool.DescriptorPool()
    for known in (duration_pb2, wrappers_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
        file.dependency.append(known.DESCRIPTOR.name)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if any(kind.startswith("oneof ") for _, _, kind in fields):
            message.oneof_decl.add(name="chosen")
        for field, number, described in fields:
            label, _, kind = described.rpartition(" ")
            made = message.field.add(name=field, number=number)
            made.label = Field.LABEL_REPEATED if label == "repeated" else Field.LABEL_OPTIONAL
            if label == "oneof":
                made.oneof_index = 0
            if kind in _SCALARS:
                made.type = _SCALARS[kind]
            else:
                made.type, made.type_name = Field.TYPE_MESSAGE, kind if "." in kind else f".{_PACKAGE}.{kind}"
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES = _classes()
Reports: Any = _CLASSES["Reports"]
"""RateLimitQuotaUsageReports."""
Response: Any = _CLASSES["Response"]
"""RateLimitQuotaResponse."""
DENY_ALL = 1
"""Blanket rule."""
