"""The policy file of a server: written by its launcher, replaced as a whole, re-read when it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mesh.process.tasks import end
from mesh.rpc.access import Access
from mesh.rpc.held_shares import HeldShares
from shoal.access.policy import Policy

log = logging.getLogger(__name__)

# A stat of a file: microseconds. Revocations are in force after so long.
_POLL_S = 0.2


@asynccontextmanager
async def followed(path: Path, shares: HeldShares | None = None) -> AsyncIterator[Access]:
    """Yield the access that the policy in `path` gives; a new file replaces the policy. `shares` counts its limits.

    Raises:
        OSError, ValueError: the file cannot be read, or holds no policy.
    """
    seen = _stamp(path)
    async with Access(_read(path), shares=shares) as access:
        following = asyncio.create_task(_follow(path, seen, access), name="policy")
        try:
            yield access
        finally:
            await end(following)


async def _follow(path: Path, seen: tuple[int, int], access: Access) -> None:
    while True:
        await asyncio.sleep(_POLL_S)
        try:
            if (stamp := _stamp(path)) != seen:
                seen = stamp
                access.set_policy(await asyncio.to_thread(_read, path))
                log.info("a new policy is in force", {"event": "policy.file_in_force"})
        # The launcher validates what it writes. The former policy stays in force.
        except (OSError, ValueError):
            log.exception(
                "%(path)s cannot be read: the former policy stays in force",
                {"event": "policy.file_unreadable", "path": path},
            )


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _read(path: Path) -> Policy:
    return Policy.model_validate_json(path.read_bytes())
