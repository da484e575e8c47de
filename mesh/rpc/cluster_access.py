"""Access of a service in a cluster: it follows the policy in etcd, and tells the cluster which one it enforces.

    etcd ──/shoal/access/──> policy in force ──> Access ──revision──> the instance's registration

Without etcd, the last known policy stays in force. Before the first one, every caller is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import Registration
from mesh.cluster.mirror import Copy, Mirror
from mesh.process.config import ServiceConfig
from mesh.process.tasks import Background, end
from mesh.process.watched import Watched
from mesh.rpc.access import Access
from mesh.rpc.held_shares import HeldShares
from mesh.rpc.share_renewal import renewing
from shoal.access import cluster
from shoal.access.policy import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InForce:
    """The policy that a process enforces."""

    policy: Policy | None = None
    """None: no policy is known, and every caller is refused."""
    version: int = 0
    revision: int = 0
    """Revision of etcd of the last change."""
    is_known: bool = False
    """False before etcd was read: there may be a policy."""


class PolicyWatch(Background):
    """Gives `access` each policy that the keys under shoal.access.cluster.PREFIX in `mirror` make."""

    def __init__(self, mirror: Mirror, access: Access) -> None:
        self._mirror = mirror
        self.access = access
        self._seen: Mapping[bytes, bytes] | None = None
        self.in_force = Watched(InForce())
        """The policy that `access` enforces."""

    async def _run(self) -> None:
        is_enforced = False
        async for copy in self._mirror.follow():
            values, revision = values_of(copy)
            if copy.stale:
                continue
            if values == self._seen:
                # Written again, as by a repeated revocation, whose caller waits for its revision.
                if is_enforced:
                    self.in_force.set(replace(self.in_force.value, revision=revision))
                continue
            self._seen, is_enforced = values, False
            try:
                # A large policy takes a tenth of a second.
                policy = await asyncio.to_thread(cluster.in_force, values)
            except (ValueError, KeyError, TypeError):
                log.exception(
                    "the policy in etcd cannot be read: the former one stays in force", {"event": "policy.unreadable"}
                )
                continue
            if policy is not None:
                self.access.set_policy(policy)
                log.info(
                    "version %(version)d of the policy is in force",
                    {"event": "policy.in_force", "version": cluster.version_of(values)},
                )
            is_enforced = True
            self.in_force.set(InForce(policy, cluster.version_of(values), revision, is_known=True))


def values_of(copy: Copy) -> tuple[dict[bytes, bytes], int]:
    """Return the values of the keys of the policy, and the revision of the last change of one."""
    found = {key: entry for key, entry in copy.entries.items() if key.startswith(cluster.PREFIX)}
    return {key: entry.value for key, entry in found.items()}, max(
        (entry.mod_revision for entry in found.values()), default=0
    )


@asynccontextmanager
async def access_of(config: ServiceConfig, shares: HeldShares | None = None) -> AsyncIterator[PolicyWatch | None]:
    """Yield the watch of the cluster's policy for a service, running; None when callers need no authentication.

    `shares` counts the service's calls in the limits of the policy.
    """
    if not config.auth:
        yield None
        return
    assert config.etcd is not None, "the configuration was checked"
    async with AsyncExitStack() as stack:
        etcd = await stack.enter_async_context(Etcd(config.etcd))
        mirror = await stack.enter_async_context(Mirror(etcd, cluster.PREFIX))
        access = await stack.enter_async_context(Access(None, shares=shares))
        await stack.enter_async_context(renewing(config, shares))
        yield await stack.enter_async_context(PolicyWatch(mirror, access))


@asynccontextmanager
async def published(
    watch: PolicyWatch | None, registration: Registration, also: Callable[[int], Awaitable[None]] | None = None
) -> AsyncIterator[None]:
    """Publish the revision of the policy that an instance enforces, now and after each change.

    `also` returns when others, for which the instance answers, enforce the policy of a revision.
    """
    if watch is None:
        yield
        return

    async def publish() -> None:
        async for in_force in watch.in_force.follow():
            if also is not None:
                await also(in_force.revision)
            await registration.update(policy_revision=in_force.revision)

    publishing = asyncio.create_task(publish(), name="policy revision")
    try:
        yield
    finally:
        await end(publishing)
