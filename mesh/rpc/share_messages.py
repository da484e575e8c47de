"""Buckets of limits in the messages of shoal.coord.v1.ShareService."""

from __future__ import annotations

from shoal.access.limits import Bucket, Kind
from shoal.coord.v1 import shares_pb2 as pb
from shoal.errors import InvalidArgument

_KINDS = {
    Kind.REQUESTS: pb.LIMIT_KIND_REQUESTS,
    Kind.IN_FLIGHT: pb.LIMIT_KIND_IN_FLIGHT,
    Kind.BYTES: pb.LIMIT_KIND_BYTES,
    Kind.ROWS: pb.LIMIT_KIND_ROWS,
}
_KIND_OF = {number: kind for kind, number in _KINDS.items()}


def bucket_message(bucket: Bucket) -> pb.LimitBucket:
    """Return the message of a bucket."""
    return pb.LimitBucket(
        limit=bucket.limit, kind=_KINDS[bucket.kind], tenant=bucket.tenant, key=bucket.key, model=bucket.model
    )


def bucket_in(message: pb.LimitBucket) -> Bucket:
    """Return the bucket of a message. Raises InvalidArgument for an unknown kind."""
    kind = _KIND_OF.get(message.kind)
    if kind is None:
        raise InvalidArgument(f"bucket of the limit {message.limit!r}: no kind {message.kind}")
    return Bucket(message.limit, kind, message.tenant, message.key, message.model)
