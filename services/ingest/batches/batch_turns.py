"""Order in which batches get what an instance has to give: tenants in turn, and the batches of each in turn."""

from __future__ import annotations

from collections.abc import Collection

from services.ingest.batches.batch import Batch


class BatchTurns:
    """Turns of tenants and batches. Batches are compared by `key`: the least is next."""

    def __init__(self) -> None:
        self._count = 0
        # The latest turn of each tenant, and of each batch.
        self._of_tenants: dict[str, int] = {}
        self._of_batches: dict[str, int] = {}

    def key(self, batch: Batch) -> tuple[int, int]:
        """Return the turns of the batch's tenant and of the batch itself; 0 before the first one."""
        return self._of_tenants.get(batch.tenant, 0), self._of_batches.get(batch.id, 0)

    def take(self, batch: Batch) -> None:
        """Note that it was the batch's turn."""
        self._count += 1
        self._of_tenants[batch.tenant] = self._of_batches[batch.id] = self._count

    def keep(self, active: Collection[Batch]) -> None:
        """Forget all tenants and batches but those of `active`."""
        tenants, ids = {batch.tenant for batch in active}, {batch.id for batch in active}
        self._of_tenants = {tenant: turn for tenant, turn in self._of_tenants.items() if tenant in tenants}
        self._of_batches = {batch_id: turn for batch_id, turn in self._of_batches.items() if batch_id in ids}
