"""gRPC servicer of ShareService: translates messages, without logic."""

from __future__ import annotations

from mesh.rpc.interceptors import Context
from services.coord.share_claims import ShareClaims
from services.coord.share_messages import demands_in, held_in, response_message
from shoal.coord.v1 import shares_pb2 as pb
from shoal.coord.v1 import shares_pb2_grpc as pb_grpc
from shoal.errors import FailedPrecondition


class ShareRpc(pb_grpc.ShareServiceServicer):
    """Servicer of ShareService; `claims` is None on a node without authentication."""

    def __init__(self, claims: ShareClaims | None) -> None:
        self._claims = claims

    async def ClaimShares(self, request: pb.ClaimSharesRequest, ctx: Context) -> pb.ClaimSharesResponse:
        if self._claims is None:
            raise FailedPrecondition("this node does not authenticate callers, so it has no limits")
        demands, held = demands_in(request), held_in(request)
        shares = await self._claims.claim(request.claimant, demands, held, is_forwarded=request.forwarded)
        return response_message(shares)
