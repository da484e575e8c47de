"""Translation of retention rules to and from their messages."""

from __future__ import annotations

from datetime import timedelta

from services.store.results.result_documents import timestamp
from services.store.retention.rules import Kept, Rule
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as pb

_KEPT = {
    pb.RetentionRule.COLLECTION_RESULTS: Kept.RESULTS,
    pb.RetentionRule.COLLECTION_ANSWERS: Kept.ANSWERS,
    pb.RetentionRule.COLLECTION_TOMBSTONES: Kept.TOMBSTONES,
}
_COLLECTIONS = {kept: number for number, kept in _KEPT.items()}
# Far above the longest rule, and within the range of a timedelta.
_MOST_S = 10**11


def rule_of(message: pb.RetentionRule) -> Rule:
    """Return the rule of a message.

    Raises:
        InvalidArgument: an unknown collection, or a duration out of range.
    """
    if message.collection not in _KEPT:
        known = ", ".join(pb.RetentionRule.Collection.Name(number) for number in _KEPT)
        raise InvalidArgument(f"rule.collection: expected one of {known}; got {message.collection}")
    keep = None
    if message.HasField("keep"):
        if abs(message.keep.seconds) > _MOST_S or abs(message.keep.nanos) >= 1_000_000_000:
            raise InvalidArgument("rule.keep: no duration: too many seconds or nanos")
        keep = timedelta(seconds=message.keep.seconds, microseconds=message.keep.nanos // 1_000)
    return Rule(_KEPT[message.collection], message.tenant if message.HasField("tenant") else None, keep)


def message_of(rule: Rule) -> pb.RetentionRule:
    """Return the message of a rule."""
    message = pb.RetentionRule(collection=_COLLECTIONS[rule.kept], tenant=rule.tenant)
    if rule.keep is not None:
        message.keep.FromTimedelta(rule.keep)
    if rule.updated_at is not None:
        message.updated_at.CopyFrom(timestamp(rule.updated_at))
    return message
