"""Admitted requests by tenant and sender: at a bound, the newest of the one with the most give way. Pure.

For the steps of sequences that wait, the requests to a decoupled model that wait, and the runs of an ensemble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
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
        # By tenant and sender, each in the order of their next turns.
        self._loads: dict[str, dict[Hashable, _Load[T]]] = {}
        self.count = 0
        self.size_bytes = 0

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._loads

    def items(self) -> list[T]:
        return [item for senders in self._loads.values() for load in senders.values() for item in load.items]

    def add(self, item: T, tenant: str) -> None:
        sender = item.request.memory.sender
        item.sender = tenant, sender
        load = self._loads.setdefault(tenant, {}).setdefault(sender, _Load())
        load.items[item] = None
        load.size_bytes += item.request.size_bytes
        self.count += 1
        self.size_bytes += item.request.size_bytes

    def remove(self, item: T) -> None:
        tenant, sender = item.sender
        load = self._loads[tenant][sender]
        del load.items[item]
        load.size_bytes -= item.request.size_bytes
        self.count -= 1
        self.size_bytes -= item.request.size_bytes
        if not load.items:
            del self._loads[tenant][sender]
            if not self._loads[tenant]:
                del self._loads[tenant]

    def pop_next(self, held: Counter[Hashable], may_hold: Callable[[str], bool]) -> T | None:
        """Remove and return the next item in turn; None when no tenant may have one.

        Args:
            held: places of tenants, and of senders by tenant and sender. Who holds the fewest is next.
            may_hold: returns True for a tenant that may have one place more.
        """
        tenant = min(filter(may_hold, self._loads), key=lambda name: held[name] / self._weight(name), default=None)
        if tenant is None:
            return None
        sender = min(self._loads[tenant], key=lambda each: held[tenant, each])
        item = next(iter(self._loads[tenant][sender].items))
        # The others are next.
        self._loads[tenant] = senders = self._loads.pop(tenant)
        senders[sender] = senders.pop(sender)
        self.remove(item)
        return item

    def victims(self, request: InferenceRequest, tenant: str, *, calls: int, size_bytes: int) -> list[T]:
        """Return those that give way to `request`: `calls` of them, with `size_bytes`. None: it is rejected itself.

        All are of one sender. It is of the tenant with the most, or of the request's own tenant when none has more.
        """
        in_bytes = size_bytes > 0
        by_sender = {
            (name, sender): load.size_bytes if in_bytes else len(load.items)
            for name, senders in self._loads.items()
            for sender, load in senders.items()
        }
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
        for item in reversed(self._loads[sender[0]][sender[1]].items):
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
