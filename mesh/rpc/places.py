"""Places for calls that stay open, such as watches: the tenants share them.

A tenant may hold twice as many places as are free, and one in any case: two thirds when it is alone. So its callers
cannot take all places from the others. Calls without a tenant, as those of operators, may take every free place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from mesh.h2.memory_account import leaves_room
from shoal.errors import ResourceExhausted


def are_for_others(held: int, free: int) -> bool:
    """Return True when the `free` places are for other tenants than one that holds `held`."""
    return held > 0 and not leaves_room(held, 1, free)


class Places:
    """Places of one kind."""

    def __init__(self, limit: int, what: str, *, retry_after_ms: int = 1_000) -> None:
        """Allow `limit` at a time; `what` names them in errors, in the plural."""
        self._limit = limit
        self._what = what
        self._retry_after_ms = retry_after_ms
        self._by_tenant: Counter[str] = Counter()
        self.taken = 0

    def held_by(self, tenant: str | None) -> int:
        """Return the number of places that a tenant holds; None: calls without a tenant."""
        return self._by_tenant.get(tenant or "", 0)

    @contextmanager
    def take(self, tenant: str | None) -> Iterator[None]:
        """Hold a place for as long as the block lasts.

        Raises:
            ResourceExhausted: all are taken, or those that are left are for other tenants.
        """
        name = tenant or ""
        held, free = self._by_tenant[name], self._limit - self.taken
        if free <= 0:
            raise self._full(f"{self.taken} {self._what} are open, which is the limit")
        if name and are_for_others(held, free):
            raise self._full(f"{held} {self._what} of this tenant are open, and the {free} places left are for others")
        self._by_tenant[name] += 1
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._by_tenant[name] -= 1
            if not self._by_tenant[name]:
                del self._by_tenant[name]

    def _full(self, why: str) -> ResourceExhausted:
        return ResourceExhausted(f"{why}: end one, or retry later", retry_after_ms=self._retry_after_ms)
