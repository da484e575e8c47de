"""Who needs an artifact, other than the registry: a name (`job/01J...`) for each use of it.

A reference and the collection of what it refers to both write to the artifact's document, in a transaction each: of the
two, one sees the other, and nothing that is referred to is ever collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import translated
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.digest import brief
from services.store.documents import Collections
from services.store.transactions import transaction
from shoal.errors import InvalidArgument, Unavailable

MOST_CHARS = 128
MOST_AT_ONCE = 1_000
"""Names of one request: half a second of MongoDB's time at most."""


class References:
    """Makes and releases references. Safe beside other instances on the same MongoDB."""

    def __init__(self, collections: Collections, artifacts: Artifacts, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._artifacts = artifacts
        self._clock = clock

    async def make(self, name: str, digest: str) -> None:
        """Has `name` refer to an artifact that is stored. Idempotent; a name that referred to another one moves.

        Raises:
            InvalidArgument: a bad name.
            Unavailable: the artifact has just been collected: upload it again.
        """
        check_name(name, "reference")
        reference = {"digest": digest, "made_at": self._clock()}

        async def both(session: AsyncClientSession) -> bool:
            if is_there := await self._artifacts.touch([digest], session):
                change = {"$set": reference}
                await self._collections.references.update_one({"_id": name}, change, upsert=True, session=session)
            return is_there

        with translated("referring to an artifact"):
            if not await transaction(self._collections, both):
                raise Unavailable(f"artifact {digest} has just been collected: upload it again")

    async def release(self, names: Sequence[str]) -> int:
        """Ends references; those that there are not are ended already. Says how many there were.

        Raises:
            InvalidArgument: a bad name, or too many.
        """
        if len(names) > MOST_AT_ONCE:
            raise InvalidArgument(f"references: at most {MOST_AT_ONCE}, got {len(names)}")
        for at, name in enumerate(names):
            check_name(name, f"references[{at}]")
        with translated("releasing references"):
            released = await self._collections.references.delete_many({"_id": {"$in": list(names)}})
        return released.deleted_count

    async def page(self, prefix: str, after: str, before: str, limit: int) -> list[tuple[str, str]]:
        """References whose names begin with `prefix`, above `after`, below `before`, in order: (name, digest).

        Raises:
            InvalidArgument: a bad prefix, bound or limit.
        """
        for field, value in (("prefix", prefix), ("after", after), ("before", before)):
            if len(value) > MOST_CHARS:
                raise InvalidArgument(f"{field}: at most {MOST_CHARS} characters, got {len(value)}")
        if not 0 <= limit <= MOST_AT_ONCE:
            raise InvalidArgument(f"page_size: 0 (the default, {MOST_AT_ONCE}) to {MOST_AT_ONCE}, got {limit}")
        bounds = {"$gte": prefix, "$lt": prefix + "\U0010ffff", "$gt": after}
        query = [{"_id": bounds}, {"_id": {"$lt": before}}] if before else [{"_id": bounds}]
        with translated("listing references"):
            cursor = self._collections.references.find({"$and": query}).sort("_id", 1).limit(limit or MOST_AT_ONCE)
            return [(doc["_id"], doc["digest"]) async for doc in cursor]


def check_name(name: str, field: str) -> None:
    """A reference's name, or InvalidArgument."""
    if not 1 <= len(name) <= MOST_CHARS or not name.isprintable():
        raise InvalidArgument(f"{field}: expected 1 to {MOST_CHARS} printable characters, got {brief(name)}")
