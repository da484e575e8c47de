"""Requests and rows of each tenant: those with the most have counts of their own, the others share one."""

from __future__ import annotations

from mesh.metrics.largest import Largest


class TenantCounts:
    """Counts of a process. Only the event loop's thread uses them."""

    def __init__(self) -> None:
        # Requests, rows.
        self.largest = Largest(2)

    def add(self, tenant: str, rows: int) -> None:
        """Count a request that begins. A caller without a tenant is not counted: `if tenant` costs less than a call."""
        row = self.largest.row(tenant)
        row[0] += 1
        row[1] += rows
