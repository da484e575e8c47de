"""Who may have things removed: coord's leader, and nobody else.

    coord's election in etcd ──> leader's fencing token ──ApplyRetention──> store ──reads the election itself──> acts

The gateway reaches this service, so a token is not believed: the store looks into the election. What happens between
that look and the removal is the business of the fence in MongoDB (book.py).
"""

from __future__ import annotations

from mesh.election import LEADER, leader_of
from mesh.etcd import Etcd
from mesh.mirror import Copy
from shoal.errors import FailedPrecondition


class Leadership:
    """Looks into coord's election. Without etcd nobody leads."""

    def __init__(self, etcd: Etcd | None) -> None:
        self._etcd = etcd

    async def check(self, token: int) -> None:
        """Whether `token` is that of the leader.

        Raises:
            FailedPrecondition: it is not.
            Unavailable: etcd is away.
        """
        if self._etcd is None:
            raise FailedPrecondition("token: this store has no etcd, so it has no leader (SHOAL_STORE_ETCD)")
        listing = await self._etcd.list(LEADER)
        leader = leader_of(Copy({entry.key: entry for entry in listing.entries}, listing.revision, False))
        if leader is None or leader.token != token:
            now = f"{leader.name} leads with {leader.token}" if leader else "nobody leads"
            raise FailedPrecondition(f"token {token}: not the leader's: {now}")
