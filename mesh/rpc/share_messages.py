"""Messages of coord's ShareService from and to the values of shoal.access.limits."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.access.limits import Amount, Bucket, Kind
from shoal.coord.v1 import shares_pb2 as pb
from shoal.errors import InvalidArgument

_KINDS = {
    Kind.REQUESTS: pb.LIMIT_KIND_REQUESTS,
    Kind.IN_FLIGHT: pb.LIMIT_KIND_IN_FLIGHT,
    Kind.BYTES: pb.LIMIT_KIND_BYTES,
    Kind.ROWS: pb.LIMIT_KIND_ROWS,
}
_KIND_OF = {number: kind for kind, number in _KINDS.items()}


def request_message(
    claimant: str, demands: Mapping[Bucket, float], held: Mapping[Bucket, float], *, is_forwarded: bool = False
) -> pb.ClaimSharesRequest:
    """Return the message of a claim. `held`: the shares that the claimant has now."""
    claims = [
        pb.ShareClaim(bucket=bucket_message(bucket), demand=demand, held=held.get(bucket, 0.0))
        for bucket, demand in demands.items()
    ]
    return pb.ClaimSharesRequest(claimant=claimant, claims=claims, forwarded=is_forwarded)


def shares_in(response: pb.ClaimSharesResponse) -> dict[Bucket, Amount]:
    """Return the shares in a response. Raises InvalidArgument."""
    return {bucket_in(share.bucket): Amount(share.amount, share.burst) for share in response.shares}


def bucket_message(bucket: Bucket) -> pb.LimitBucket:
    """Return the message of a bucket."""
    return pb.LimitBucket(
        limit=bucket.limit, kind=_KINDS[bucket.kind], tenant=bucket.tenant, key=bucket.key, model=bucket.model
    )


def bucket_in(message: pb.LimitBucket) -> Bucket:
    """Return the bucket in a message. Raises InvalidArgument."""
    kind = _KIND_OF.get(message.kind)
    if kind is None:
        raise InvalidArgument(f"bucket of the limit {message.limit!r}: no kind {message.kind}")
    return Bucket(message.limit, kind, message.tenant, message.key, message.model)
