"""Confirmation that a policy is in force: each instance publishes the revision of the policy that it enforces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from mesh.cluster.membership import Instance, view_of
from mesh.cluster.mirror import Copy, Mirror

# An instance without a registration that ends changes no key: nothing wakes whoever waits for it.
_AGAIN_S = 0.2


def lagging(copy: Copy, serving: Iterable[Instance], revision: int) -> tuple[str, ...]:
    """Return the names of the instances that enforce an older policy. Instances without authentication are left out.

    Of an instance that is in `serving` and in `copy`, the entry in `copy` counts.
    """
    instances = {instance.name: instance for instance in (*serving, *view_of(copy).instances)}
    return tuple(
        sorted(
            name
            for name, instance in instances.items()
            if instance.policy_revision is not None and instance.policy_revision < revision
        )
    )


class Enforcement:
    """Waits until every instance enforces a policy. `mirror` has all keys of the cluster."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self.serving: Callable[[], Iterable[Instance]] = tuple
        """Returns the instances that may serve calls, also without a registration: they are waited for, too."""

    async def lacking(self, revision: int, within_s: float) -> tuple[str, ...]:
        """Wait until every instance enforces the policy of `revision`, at most `within_s`; return those that do not."""
        deadline = time.monotonic() + within_s
        while True:
            copy = self._mirror.copy
            # Before the copy has the write, it may lack an instance that started meanwhile.
            late = lagging(copy, self.serving(), revision) if copy.revision >= revision else ("coord",)
            left_s = deadline - time.monotonic()
            if not late or left_s <= 0:
                return late
            await self._mirror.after(copy, min(left_s, _AGAIN_S))
