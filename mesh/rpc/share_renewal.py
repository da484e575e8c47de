"""Claims of shares at coord, in the background: no call waits for them.

    demand of each bucket ──> coord's leader ──granted shares, until they expire──> HeldShares

A new bucket is claimed at once. The others are renewed as often as coord says. A bucket that a claim leaves out is
released. While coord does not answer, the shares hold until they expire, then `unrenewed` of their limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from mesh.process.config import ServiceConfig
from mesh.process.tasks import Background
from mesh.rpc.channel import AnyChannel
from mesh.rpc.client.channel import Channel
from mesh.rpc.held_shares import HeldShares
from mesh.rpc.interceptors import translated
from mesh.rpc.share_messages import request_message, shares_in
from shoal.coord.v1 import shares_pb2 as pb
from shoal.coord.v1 import shares_pb2_grpc
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

# A claim that takes longer has failed: the next one says the same.
_TIMEOUT_S = 2.0
# Pause after a failed claim, and expiry of a provisional share that no claim has ever answered.
_RETRY_S, _NEVER_ANSWERED_S = 1.0, 10.0
# Pause before the claim of a new bucket, so that others join it: an installation may get many new callers at once.
_JOINED_S = 0.005
# Least pause between two claims.
_LEAST_S = 0.05


class ShareRenewal(Background):
    """Claims the shares of `claimant`, an instance, over `channel`. Use as `async with`."""

    def __init__(self, shares: HeldShares, channel: AnyChannel, claimant: str) -> None:
        self._shares = shares
        self._stub = shares_pb2_grpc.ShareServiceStub(channel)
        self._claimant = claimant
        self._is_new = asyncio.Event()
        self._has_claims = False
        self._lifetime_s = _NEVER_ANSWERED_S
        shares.on_new = self._is_new.set

    async def _run(self) -> None:
        pause_s = 0.0
        while True:
            await asyncio.sleep(_LEAST_S)
            with suppress(TimeoutError):
                # Without claims, nothing is renewed.
                async with asyncio.timeout(pause_s if self._has_claims else None):
                    await self._is_new.wait()
                    await asyncio.sleep(_JOINED_S)
            self._is_new.clear()
            try:
                pause_s = await self._claim()
            except ShoalError as err:
                log.warning(
                    "cannot claim shares of limits for now: %(error)s", {"event": "limits.claim_retrying", "error": err}
                )
                pause_s = _RETRY_S
            # A fault of one claim must not end the claims.
            except Exception:
                log.exception("unexpected error while claiming shares of limits", {"event": "limits.claim_failed"})
                pause_s = _RETRY_S
            self._shares.expire(self._lifetime_s)

    async def _claim(self) -> float:
        """Claim the shares; return the seconds until the next claim. Raises a ShoalError."""
        claims = self._shares.demands()
        # A claim of nothing releases what the one before had.
        if not claims and not self._has_claims:
            return 0.0
        self._has_claims = bool(claims)
        request = request_message(self._claimant, claims, self._shares.held())
        with translated("claiming shares of limits"):
            response: pb.ClaimSharesResponse = await self._stub.ClaimShares(request, timeout=_TIMEOUT_S)
        self._lifetime_s = response.lifetime_ms / 1000
        self._shares.grant(shares_in(response), self._lifetime_s)
        return max(response.renew_ms / 1000, _LEAST_S)


@asynccontextmanager
async def renewing(config: ServiceConfig, shares: HeldShares | None) -> AsyncIterator[None]:
    """Claim the shares of a service's instance while the block lasts; without a mesh, or without shares, do nothing."""
    async with AsyncExitStack() as stack:
        if shares is not None and config.mesh is not None:
            channel = await stack.enter_async_context(Channel(config.mesh))
            await stack.enter_async_context(ShareRenewal(shares, channel, f"{config.node}/{config.instance}"))
        yield
