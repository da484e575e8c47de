"""Order of delivery of a model with `preserve_ordering`: the outcomes of a tenant are passed on in order of arrival.

Tenants have orders of their own. They share the model by turns, so an order over all of them would hold the outcome
of a tenant's only request up until another tenant's whole queue has run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from services.infer.scheduling.delivery import PendingRequest

T = TypeVar("T", bound=PendingRequest)


class DeliveryOrder(Generic[T]):
    """Requests without a delivered outcome, by tenant, in the order in which their outcomes are passed on."""

    def __init__(self) -> None:
        # Bounded by the requests that the scheduler has admitted.
        self._by_tenant: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_tenant.values()))

    def add(self, request: T, tenant: str) -> None:
        """Add a request behind those of its tenant."""
        self._by_tenant.setdefault(tenant, deque()).append(request)

    def pop_ready(self, tenant: str, is_ready: Callable[[T], bool]) -> list[T]:
        """Remove and return the first requests of a tenant up to one that is not ready."""
        waiting = self._by_tenant.get(tenant, deque())
        ready: list[T] = []
        while waiting and is_ready(waiting[0]):
            ready.append(waiting.popleft())
        if not waiting:
            self._by_tenant.pop(tenant, None)
        return ready
