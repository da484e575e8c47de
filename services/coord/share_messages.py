"""Messages of ShareService as coord reads and writes them; those that its claimants use, too, are in the mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mesh.rpc.share_messages import bucket_in, bucket_message
from services.coord.shares import CLAIMS, LIFETIME_S, RENEW_S
from shoal.access.limits import Amount, Bucket
from shoal.coord.v1 import shares_pb2 as pb
from shoal.errors import InvalidArgument


def demands_in(request: pb.ClaimSharesRequest) -> dict[Bucket, float]:
    """Return the claimed buckets with their demands. Raises InvalidArgument."""
    if not request.claimant:
        raise InvalidArgument("claimant is missing: give the name of the instance")
    if len(request.claims) > CLAIMS:
        raise InvalidArgument(f"{len(request.claims)} claims, of at most {CLAIMS}: claim what is in use")
    return _numbers("demand", {bucket_in(claim.bucket): claim.demand for claim in request.claims})


def held_in(request: pb.ClaimSharesRequest) -> dict[Bucket, float]:
    """Return the claimed buckets with the shares that the claimant has. Raises InvalidArgument."""
    return _numbers("held", {bucket_in(claim.bucket): claim.held for claim in request.claims})


def _numbers(field: str, found: dict[Bucket, float]) -> dict[Bucket, float]:
    if any(math.isnan(number) or number < 0 for number in found.values()):
        raise InvalidArgument(f"{field}: expected a number that is not negative")
    return found


def response_message(shares: Mapping[Bucket, Amount]) -> pb.ClaimSharesResponse:
    """Return the message of shares."""
    return pb.ClaimSharesResponse(
        shares=[
            pb.GrantedShare(bucket=bucket_message(bucket), amount=share.amount, burst=share.burst)
            for bucket, share in shares.items()
        ],
        renew_ms=round(RENEW_S * 1000),
        lifetime_ms=round(LIFETIME_S * 1000),
    )
