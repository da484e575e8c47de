"""Confirmation that a policy is in force: each instance publishes the revision of the policy that it enforces."""

from __future__ import annotations

import time

from mesh.cluster.membership import view_of
from mesh.cluster.mirror import Copy, Mirror


def lagging(copy: Copy, revision: int) -> tuple[str, ...]:
    """Return the names of the instances that enforce an older policy. Instances without authentication are left out."""
    return tuple(
        instance.name
        for instance in view_of(copy).instances
        if instance.policy_revision is not None and instance.policy_revision < revision
    )


async def enforced(mirror: Mirror, revision: int, within_s: float) -> tuple[str, ...]:
    """Wait until every instance enforces the policy of `revision`, at most `within_s`; return those that do not."""
    deadline = time.monotonic() + within_s
    while True:
        copy = mirror.copy
        # Before the copy has the write, it may lack an instance that started meanwhile.
        late = lagging(copy, revision) if copy.revision >= revision else ("coord",)
        left_s = deadline - time.monotonic()
        if not late or left_s <= 0:
            return late
        await mirror.after(copy, left_s)
