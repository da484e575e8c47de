"""First start of a cluster with authentication: whichever coord is first makes its signer and its first policy."""

from __future__ import annotations

import asyncio
import logging

from mesh.process.tasks import Background
from services.coord.access_rpc import AccessParts
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

_RETRY_S = 0.3


class FirstStart(Background):
    """Makes what is missing, as soon as etcd is reachable. Use as `async with`."""

    def __init__(self, parts: AccessParts) -> None:
        self._parts = parts

    async def _run(self) -> None:
        while True:
            try:
                # The policy is the sign that the signer is there.
                await self._parts.keys.begin()
                await self._parts.policies.begin()
                return
            except ShoalError as err:
                log.warning("keys and policy are not ready yet: %s", err)
                await asyncio.sleep(_RETRY_S)
