"""Claims of shares: the leading coord divides the limits; the others pass the claims of their claimants on to it.

    gateways, services ──claim──> this coord ──leader?──> Shares
                                      └──another leads──ClaimShares──> the leader's Shares

A coord that reaches no leader divides the limits itself, so that they hold in an outage of etcd. While several coords
do so, each hands out the whole limit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Self

import grpc

from mesh.cluster.mirror import Mirror
from mesh.process.watched import Watched
from mesh.rpc.cluster_access import InForce
from mesh.rpc.share_messages import request_message, shares_in
from services.coord.leader_channel import FAILED, LeaderChannel
from services.coord.shares import RENEW_S, Shares
from shoal.access.caller_header import AS_SERVICE
from shoal.access.limits import Amount, Bucket
from shoal.access.policy import Limit, Policy
from shoal.coord.v1 import shares_pb2_grpc
from shoal.errors import ShoalError, Unavailable

log = logging.getLogger(__name__)

# Longest wait for the leader. A claim is repeated each second.
_TIMEOUT_S = 0.5


class ShareClaims:
    """Takes the claims of this coord's gateways and services. Use as `async with`.

    Args:
        mirror: copy of all keys of the cluster, which tell the leader.
        in_force: the policy in force.
        name: this instance.
    """

    renew_s = RENEW_S

    def __init__(
        self, mirror: Mirror, in_force: Watched[InForce], name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._in_force = in_force
        self._clock = clock
        self._shares = Shares()
        self._policy: Policy | None = None
        self._limits: Mapping[str, Limit] = {}
        self._leader = LeaderChannel(mirror, name)
        self._divides_alone = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._leader.__aexit__(*exc)

    def limit(self, name: str) -> Limit | None:
        """Return a limit of the policy in force."""
        return self._followed().get(name)

    async def changed(self) -> None:
        """Return when the policy has changed."""
        await self._in_force.after(self._in_force.value)

    async def claim(
        self,
        claimant: str,
        demands: Mapping[Bucket, float],
        held: Mapping[Bucket, float] = MappingProxyType({}),
        *,
        is_forwarded: bool = False,
    ) -> Mapping[Bucket, Amount]:
        """Return the shares of a claimant, which replace its former ones, `held`.

        Args:
            is_forwarded: another coord takes this one for the leader: the claim goes no further.

        Raises:
            Unavailable: no policy is known yet.
        """
        if self._in_force.value.policy is None:
            raise Unavailable("this coord does not know the policy yet: retry")
        if not is_forwarded and (leader := await self._leader.get()) is not None:
            try:
                return await self._forwarded(leader, claimant, demands, held)
            except (*FAILED, ShoalError) as err:
                self._note(alone=True, why=str(err))
        self._followed()
        found: dict[Bucket, Amount] = {}
        for step in self._shares.claim_in_steps(claimant, demands, self._clock(), held):
            found.update(step)
            await asyncio.sleep(0)
        return found

    def leave(self, claimant: str) -> None:
        """Release the shares of a claimant. Those that the leader has handed out expire."""
        self._shares.leave(claimant)

    async def _forwarded(
        self,
        leader: grpc.aio.Channel,
        claimant: str,
        demands: Mapping[Bucket, float],
        held: Mapping[Bucket, float],
    ) -> Mapping[Bucket, Amount]:
        stub = shares_pb2_grpc.ShareServiceStub(leader)
        request = request_message(claimant, demands, held, is_forwarded=True)
        response = await stub.ClaimShares(request, timeout=_TIMEOUT_S, metadata=AS_SERVICE)
        self._note(alone=False)
        self._shares.leave(claimant)
        return shares_in(response)

    def _followed(self) -> Mapping[str, Limit]:
        """Return the limits of the policy in force, after the shares follow them, too."""
        policy = self._in_force.value.policy
        if policy is not self._policy:
            self._policy = policy
            self._limits = {limit.name: limit for limit in (policy.limits if policy is not None else ())}
            self._shares.set_limits(self._limits.values())
        return self._limits

    def _note(self, *, alone: bool, why: str = "") -> None:
        if alone is not self._divides_alone:
            self._divides_alone = alone
            log.warning(
                "limits are divided by %(by)s",
                {"event": "limits.divided_by", "by": f"this coord alone: {why}" if alone else "the leader again"},
            )
