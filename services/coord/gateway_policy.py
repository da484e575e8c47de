"""The gateway's part of the policy in force, for every Envoy: rebuilt after each change, in a thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from mesh.process.tasks import Background
from mesh.process.watched import Watched
from mesh.rpc.cluster_access import PolicyWatch
from mesh.xds.extensions import GatewayAccess, gateway_access

log = logging.getLogger(__name__)


class GatewayPolicy(Background):
    """Follows the policy in force. In a cluster without one, the gateway refuses every call. Use as `async with`.

    Args:
        services: gRPC services (`package.Service`) at the gateway; all others are refused.
    """

    def __init__(self, watch: PolicyWatch, services: Sequence[str]) -> None:
        self._watch = watch
        self._services = tuple(services)
        self.access: Watched[GatewayAccess | None] = Watched(None)
        """None before etcd was read: Envoys keep what they have."""

    async def _run(self) -> None:
        async for in_force in self._watch.in_force.follow():
            if not in_force.is_known:
                continue
            try:
                access = await asyncio.to_thread(gateway_access, in_force.policy, self._services, in_force.revision)
                self.access.set(access)
            # The task goes on: later revocations must reach Envoy.
            except Exception:
                log.exception(
                    "version %(version)d of the policy cannot be given to Envoy",
                    {"event": "policy.not_given_to_envoy", "version": in_force.version},
                )
