"""Translation of retention rules to and from their messages."""

from __future__ import annotations

from datetime import timedelta

from services.store.results.result_documents import timestamp
from services.store.retention.rules import DataKind, Rule
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as pb

_KINDS = {
    pb.RetentionRule.COLLECTION_RESULTS: DataKind.RESULTS,
    pb.RetentionRule.COLLECTION_ANSWERS: DataKind.ANSWERS,
    pb.RetentionRule.COLLECTION_TOMBSTONES: DataKind.TOMBSTONES,
}
_COLLECTIONS = {kind: number for number, kind in _KINDS.items()}
# Far above the longest rule, and within the range of a timedelta.
_MOST_S = 10**11


def rule_of(message: pb.RetentionRule) -> Rule:
    """Return the rule of a message.

    Raises:
        InvalidArgument: an unknown collection, or a duration out of range.
    """
    if message.collection not in _KINDS:
        known = ", ".join(pb.RetentionRule.Collection.Name(number) for number in _KINDS)
        raise InvalidArgument(f"rule.collection: expected one of {known}; got {message.collection}")
    keep = None
    if message.HasField("keep"):
        if abs(message.keep.seconds) > _MOST_S or abs(message.keep.nanos) >= 1_000_000_000:
            raise InvalidArgument("rule.keep: no duration: too many seconds or nanos")
        keep = timedelta(seconds=message.keep.seconds, microseconds=message.keep.nanos // 1_000)
    return Rule(_KINDS[message.collection], message.tenant if message.HasField("tenant") else None, keep)


def message_of(rule: Rule) -> pb.RetentionRule:
    """Return the message of a rule."""
    message = pb.RetentionRule(collection=_COLLECTIONS[rule.kind], tenant=rule.tenant)
    if rule.keep_for is not None:
        message.keep.FromTimedelta(rule.keep_for)
    if rule.updated_at is not None:
        message.updated_at.CopyFrom(timestamp(rule.updated_at))
    return message
