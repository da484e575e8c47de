"""References to artifacts other than by models: a name (`job/01J...`) for each use of an artifact.

Making a reference and collecting its artifact both write to the artifact's document, each in a transaction. One of the
two sees the other, so a referenced artifact is never collected.

    references  {_id: name, digest, made_at, tenant?, size?}

A reference made for a tenant counts towards the tenant's usage while it exists. The transaction that makes, moves or
ends the reference also notes the change of usage (`usage/changes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from pymongo.asynchronous.client_session import AsyncClientSession

from mesh.mongo import Document, translated
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.digest import brief
from services.store.artifacts.stored import Stored
from services.store.documents import Collections
from services.store.results.result_rules import check_text
from services.store.transactions import transaction
from services.store.usage.changes import Changes
from services.store.usage.weight import Weight, by_tenant, weight_of_payloads
from shoal.errors import InvalidArgument, Unavailable

MOST_CHARS = 128
MOST_AT_ONCE = 1_000
"""Names of one request: half a second of MongoDB's time at most."""
_COUNTED = {"tenant": 1, "size": 1}


class References:
    """Makes and releases references. Safe beside other instances on the same MongoDB."""

    def __init__(self, collections: Collections, artifacts: Artifacts, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._artifacts = artifacts
        self._clock = clock
        self._changes = Changes(collections)

    async def make(self, name: str, artifact: Stored, tenant: str | None = None) -> None:
        """Make the reference `name` to a stored artifact. Idempotent; an existing reference of that name moves.

        Args:
            tenant: the tenant whose usage the reference counts towards; None: no tenant's.

        Raises:
            InvalidArgument: a bad name or tenant.
            Unavailable: the artifact has just been collected: upload it again.
        """
        check_name(name, "reference")
        check_tenant(tenant, "tenant")
        reference: Document = {"_id": name, "digest": artifact.digest, "made_at": self._clock()}
        if tenant is not None:
            reference |= {"tenant": tenant, "size": artifact.size}

        async def all_or_nothing(session: AsyncClientSession) -> bool:
            if not await self._artifacts.touch([artifact.digest], session):
                return False
            before = await self._collections.references.find_one_and_replace(
                {"_id": name}, reference, upsert=True, session=session
            )
            await self._changes.note(_difference([before] if before else [], [reference]), session)
            return True

        with translated("referring to an artifact"):
            if not await transaction(self._collections, all_or_nothing):
                raise Unavailable(f"artifact {artifact.digest} has just been collected: upload it again")

    async def release(self, names: Sequence[str]) -> int:
        """End references; names without a reference are ignored. Return the number of references that existed.

        Raises:
            InvalidArgument: a bad name, or too many.
        """
        if len(names) > MOST_AT_ONCE:
            raise InvalidArgument(f"references: at most {MOST_AT_ONCE}, got {len(names)}")
        for at, name in enumerate(names):
            check_name(name, f"references[{at}]")
        some = {"_id": {"$in": list(names)}}

        async def all_or_nothing(session: AsyncClientSession) -> int:
            # Both operations see the same references: a concurrent change aborts this transaction, which then restarts.
            ended = await self._collections.references.find(some, _COUNTED, session=session).to_list()
            await self._collections.references.delete_many(some, session=session)
            await self._changes.note(_difference(ended, []), session)
            return len(ended)

        with translated("releasing references"):
            return await transaction(self._collections, all_or_nothing)

    async def page(self, prefix: str, after: str, before: str, limit: int) -> list[tuple[str, str]]:
        """Return references with names that begin with `prefix`, above `after`, below `before`: (name, digest) by name.

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


def _difference(before: Iterable[Document], after: Iterable[Document]) -> Mapping[str, Weight]:
    """Return the change of usage per tenant when `after` replaces `before`. References without tenant do not count."""
    more = [(doc["tenant"], weight_of_payloads(1, doc["size"])) for doc in after if "tenant" in doc]
    less = [(doc["tenant"], Weight() - weight_of_payloads(1, doc["size"])) for doc in before if "tenant" in doc]
    return by_tenant(more + less)


def check_tenant(tenant: str | None, field: str) -> None:
    """Raise InvalidArgument when a reference may not count towards that tenant."""
    if tenant is not None:
        check_text(tenant, field)


def check_name(name: str, field: str) -> None:
    """Raise InvalidArgument when a reference may not have that name."""
    if not 1 <= len(name) <= MOST_CHARS or not name.isprintable():
        raise InvalidArgument(f"{field}: expected 1 to {MOST_CHARS} printable characters, got {brief(name)}")
