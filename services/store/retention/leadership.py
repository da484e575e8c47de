"""Who may have things removed: coord's leader, and nobody else.

    coord's election in etcd ──> leader's fencing token ──ApplyRetention──> store ──reads the election itself──> acts

The gateway reaches this service, so a token is not believed: the store looks into the election. What happens between
that look and the removal is the business of the fence in MongoDB (book.py).

Tokens are revisions of one etcd. A new one (its data lost, or the database restored beside another) begins anew, and
its leaders must not be taken for earlier ones: so each etcd is given an id of its own, by whoever asks first, and the
fence compares tokens of one etcd only.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from mesh.election import LEADER, leader_of
from mesh.etcd import Etcd, Modified, Put
from mesh.mirror import Copy
from shoal.errors import FailedPrecondition, Unavailable

ID = b"/shoal-id"
"""Holds the id of an etcd. Outside of `/shoal/`, which coord follows."""


@dataclass(frozen=True)
class Mandate:
    """The word of a leader: its fencing token, and the etcd that gave it."""

    token: int
    etcd: str


class Leadership:
    """Looks into coord's election. Without etcd nobody leads."""

    def __init__(self, etcd: Etcd | None) -> None:
        self._etcd = etcd

    async def mandate(self, token: int) -> Mandate:
        """That of the leader, whose `token` it must be.

        Raises:
            FailedPrecondition: it is not.
            Unavailable: etcd is away.
        """
        if self._etcd is None:
            raise FailedPrecondition("token: this store has no etcd, so it has no leader (SHOAL_STORE_ETCD)")
        id_ = await _id_of(self._etcd)
        listing = await self._etcd.list(LEADER)
        leader = leader_of(Copy({entry.key: entry for entry in listing.entries}, listing.revision, False))
        if leader is None or leader.token != token:
            now = f"{leader.name} leads with {leader.token}" if leader else "nobody leads"
            raise FailedPrecondition(f"token {token}: not the leader's: {now}")
        return Mandate(token, id_)


async def _id_of(etcd: Etcd) -> str:
    if (entry := await etcd.get(ID)) is None:
        await etcd.transact([Modified(ID, 0)], [Put(ID, uuid.uuid4().hex.encode())])
        entry = await etcd.get(ID)
    if entry is None:
        raise Unavailable("etcd forgot its id as it was given: retry")
    return entry.value.decode(errors="replace")
