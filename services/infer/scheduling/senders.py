"""Admitted requests by tenant and sender: at a bound, the newest of the one with the most give way. Pure.

For the steps of sequences that wait, the requests to a decoupled model that wait, and the runs of an ensemble.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from services.infer.requests.request import InferenceRequest


class Sent(Protocol):
    """A request that was admitted. Compared by identity."""

    request: InferenceRequest
    sender: tuple[str, Hashable]
    """Tenant of the request and sender of its call."""

    def __hash__(self) -> int: ...


T = TypeVar("T", bound=Sent)


@dataclass(slots=True)
class _Load(Generic[T]):
    """The requests of one sender, in order of arrival."""

    items: dict[T, None] = field(default_factory=dict)
    size_bytes: int = 0


class Senders(Generic[T]):
    """The senders of the requests to one model version."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights`: shares by tenant; 1 for tenants without an entry."""
        self._weights = weights
        self._loads: dict[tuple[str, Hashable], _Load[T]] = {}

    def add(self, item: T, tenant: str) -> None:
        item.sender = tenant, item.request.memory.sender
        load = self._loads.setdefault(item.sender, _Load())
        load.items[item] = None
        load.size_bytes += item.request.size_bytes

    def remove(self, item: T) -> None:
        load = self._loads[item.sender]
        del load.items[item]
        load.size_bytes -= item.request.size_bytes
        if not load.items:
            del self._loads[item.sender]

    def victims(self, request: InferenceRequest, tenant: str, *, calls: int, size_bytes: int) -> list[T]:
        """Return those that give way to `request`: `calls` of them, with `size_bytes`. None: it is rejected itself.

        All are of one sender. It is of the tenant with the most, or of the request's own tenant when none has more.
        """
        in_bytes = size_bytes > 0
        by_sender = {sender: load.size_bytes if in_bytes else len(load.items) for sender, load in self._loads.items()}
        by_tenant: dict[str, float] = {}
        for (name, _), units in by_sender.items():
            by_tenant[name] = by_tenant.get(name, 0.0) + units / self._weight(name)
        own = request.size_bytes if in_bytes else 1
        heaviest = max(by_tenant, key=by_tenant.__getitem__, default=tenant)
        after = by_tenant.get(tenant, 0.0) + own / self._weight(tenant)
        if by_tenant.get(heaviest, 0.0) <= after:
            heaviest = tenant
        sender = max((each for each in by_sender if each[0] == heaviest), key=by_sender.__getitem__, default=None)
        if sender is None:
            return []
        if heaviest == tenant:
            spare = float(by_sender[sender] - by_sender.get((tenant, request.memory.sender), 0) - own)
        else:
            spare = (by_tenant[heaviest] - after) * self._weight(heaviest)
        victims: list[T] = []
        for item in reversed(self._loads[sender].items):
            # Only while the sender holds more: else two would evict each other for ever.
            if spare <= 0 or (calls <= 0 and size_bytes <= 0):
                break
            victims.append(item)
            spare -= item.request.size_bytes if in_bytes else 1
            calls -= 1
            size_bytes -= item.request.size_bytes
        return victims if calls <= 0 and size_bytes <= 0 else []

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)
