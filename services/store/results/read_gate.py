"""Bound of the responses that a store reads at a time: many calls for large results would need many gigabytes.

    call ──small page, small response──────────────────> read
      └────large──> queue of its tenant ──turn, room──> read ──> message: the server counts it until the client has it

Nothing that waits for a client is in the gate, so a place comes free as fast as disks and MongoDB are.
"""

from __future__ import annotations

from types import TracebackType

from mesh.rpc.tenant_turns import TenantTurns

READ_BYTES = 128 << 20
"""Responses that are read at a time. Each exists some five times until its message is written."""

UNGATED_BYTES = 1 << 20
"""Responses of one call that are read without a place. MongoDB's connections bound the number of such calls."""


class ReadGate(TenantTurns):
    """Places for large reads, in bytes. Tenants take turns."""

    def __init__(self, limit: int = READ_BYTES) -> None:
        super().__init__(limit)

    def reading(self, tenant: str | None) -> Reading:
        """Return a read of `tenant`, which has no place yet."""
        return Reading(self, tenant or "")


class Reading:
    """The responses that one call reads. Use as `with`: the end gives its place back."""

    def __init__(self, gate: ReadGate, tenant: str) -> None:
        self._gate = gate
        self._tenant = tenant
        self._size = 0

    async def take(self, size: int) -> None:
        """Wait for a place for `size` bytes. Small reads need none, and one that has a place keeps it."""
        if size > UNGATED_BYTES and not self._size:
            await self._gate.admit(self._tenant, size)
            self._size = size

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if self._size:
            self._gate.release(self._tenant, self._size)
