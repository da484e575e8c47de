"""The policy file of `shoal serve`: its changes reach the workers and Envoy while the server runs.

the user's file, files of keys ──> validated ──> policy.json ──> workers
                                            └──> Edge ──> Envoy
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from mesh.process.files import write_atomically
from mesh.process.tasks import Background
from shoal.access import policy as policies
from shoal.access.policy import Policy
from shoal.errors import ShoalError
from shoal.node.envoy_edge import Edge

log = logging.getLogger(__name__)

# Some stats of files. Changes are in force after so long, and half a second more in the workers.
_POLL_S = 0.25
# Envoy reads a changed file within a tenth of a second.
_TAKEN_S = 0.5

_Stamps = tuple[tuple[str, int, int], ...]


class PolicyFile(Background):
    """Applies the policy now, and after each change. An invalid file changes nothing. Use as `async with`.

    Args:
        source: the user's file.
        policy: its content.
        target: file for the workers.
        report: called with a text for the user after each change.
    """

    def __init__(self, source: Path, policy: Policy, target: Path, edge: Edge, report: Callable[[str], None]) -> None:
        self._source = source
        self._policy: Policy | None = policy
        """Policy in force; None: a part of a policy could not be written."""
        self._target = target
        self._edge = edge
        self._report = report
        self._files = policies.files(source)
        # The files may have changed since `policy` was read: the first look reads them again.
        self._seen: _Stamps = ()
        write_atomically(target, policy.model_dump_json())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            if (stamps := _stamps(self._files)) != self._seen:
                self._seen = stamps
                await self._change()

    async def _change(self) -> None:
        try:
            policy = await asyncio.to_thread(policies.load, self._source)
            files = await asyncio.to_thread(policies.files, self._source)
            if files != self._files:
                # Other files are looked at from now on: read once more, for a change in between.
                self._files, self._seen = files, ()
            if policy == self._policy:
                return
            refused = await self._edge.rejected_policies()
            self._policy = None
            # Workers first: what the new policy refuses ends there, whatever Envoy still lets pass.
            await asyncio.to_thread(write_atomically, self._target, policy.model_dump_json())
            await asyncio.to_thread(self._edge.apply, policy)
        except ShoalError as err:
            self._report(f"{err.message}\nthe former policy stays in force")
            return
        except OSError as err:
            self._report(f"the policy cannot be applied: {err}: correct the cause, and write {self._source} again")
            return
        # The task goes on: later revocations must be in force.
        except Exception as err:
            log.exception("%(path)s cannot be applied", {"event": "policy.file_not_applied", "path": self._source})
            self._report(f"{self._source}: the policy cannot be applied ({type(err).__name__}): change it")
            return
        self._policy = policy
        await asyncio.sleep(_TAKEN_S)
        if await self._edge.rejected_policies() > refused:
            self._report(f"{self._source}: Envoy refuses the policy: calls are refused that either version refuses")
        else:
            self._report(f"{self._source}: the new policy is in force")


def _stamps(files: list[Path]) -> _Stamps:
    """Return what changes when a file does. A missing file has a stamp of its own."""
    found = []
    for path in files:
        try:
            status = path.stat()
            found.append((str(path), status.st_mtime_ns, status.st_ino))
        except OSError:
            found.append((str(path), 0, 0))
    return tuple(found)
