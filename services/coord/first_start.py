"""First start of a cluster with authentication: whichever coord is first makes its signer and its first policy.

    etcd has no policy ──> a copy in the data folder, or a history? ──yes──> the last policy is applied again
                                                                   └──no───> a new cluster: the first policy
    etcd has less history than before ──> another coord may have begun anew, with less: a later copy replaces that
    etcd has one ──each change──> the copy

A copy that cannot be read stops this, unless etcd has a policy that somebody has applied: the first policy allows more
than another one, so callers stay refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from mesh.cluster.mirror import Mirror
from mesh.process.tasks import Background
from services.coord.access_rpc import AccessParts
from services.coord.policy_copy import PolicyCopy, Saved
from shoal.access import cluster
from shoal.errors import Aborted, FailedPrecondition, NotFound, ShoalError

log = logging.getLogger(__name__)

_RETRY_S = 0.3


class FirstStart(Background):
    """Makes what is missing, as soon as etcd is reachable, and keeps the copy. Use as `async with`.

    Args:
        mirror: has all keys of the cluster.
        copy: None: this coord keeps none.
    """

    def __init__(self, parts: AccessParts, mirror: Mirror, copy: PolicyCopy | None = None) -> None:
        self._parts = parts
        self._mirror = mirror
        self._copy = copy
        self._kept: tuple[int, Mapping[str, float]] | None = None
        """Version and revoked keys in the copy."""

    async def _run(self) -> None:
        await self._until_begun()
        revision = 0
        async for seen in self._mirror.follow():
            if seen.stale:
                continue
            # Another coord may have begun anew before this one has seen the loss: the copy must not follow it.
            went_back, revision = seen.revision < revision, seen.revision
            is_lost = cluster.POLICY not in seen.entries
            if is_lost or went_back:
                log.warning(
                    "etcd has lost the policy" if is_lost else "etcd has lost changes", {"event": "policy.lost_by_etcd"}
                )
                await self._until_begun()
            if self._copy is not None and not is_lost:
                await self._keep(self._copy)

    async def _until_begun(self) -> None:
        while True:
            try:
                await self._begin()
                self._parts.keys.trouble = ""
                return
            # Another coord was faster. Its policy may be older than the copy here, so it is compared.
            except Aborted:
                pass
            except ShoalError as err:
                if err.message != self._parts.keys.trouble:
                    log.warning(
                        "keys and policy are not ready yet: %(error)s",
                        {"event": "policy.first_start_retrying", "error": err},
                    )
                self._parts.keys.trouble = err.message
            # A bug must not leave the cluster without a policy for ever.
            except Exception:
                log.exception("keys and policy cannot be made", {"event": "policy.first_start_failed"})
            await asyncio.sleep(_RETRY_S)

    async def _begin(self) -> None:
        try:
            saved = None if self._copy is None else await asyncio.to_thread(self._copy.read)
        except FailedPrecondition as err:
            if not await self._parts.policies.is_changed():
                raise
            log.warning(
                "etcd has the policy, and its copy is made anew: %(error)s",
                {"event": "policy.copy_remade", "error": err.message},
            )
            saved = None
        failed = None
        try:
            await self._parts.keys.begin(saved.revoked if saved is not None else {})
        # A policy has no secret: it is restored under another master key, too.
        except Exception as err:
            failed = err
        await self._parts.policies.begin(saved.applied if saved is not None else None)
        if failed is not None:
            raise failed

    async def _keep(self, copy: PolicyCopy) -> None:
        """Renew the copy when the policy or the revoked keys have changed."""
        try:
            entries = self._mirror.copy.entries
            revoked = cluster.revoked_of(entries[cluster.REVOKED].value) if cluster.REVOKED in entries else {}
            version = cluster.version_of({cluster.POLICY: entries[cluster.POLICY].value})
            if self._kept == (version, revoked):
                return
            await asyncio.to_thread(copy.write, Saved(await self._parts.policies.get(version), revoked))
            self._kept = version, revoked
        except NotFound:
            pass  # It was replaced meanwhile: the next change follows.
        except (ShoalError, OSError, ValueError, LookupError, TypeError) as err:
            log.warning(
                "the copy of the policy in %(path)s is not renewed: %(error)s",
                {"event": "policy.copy_not_renewed", "path": copy.path, "error": err},
            )
