"""Quotas: the storage that each tenant's results and payloads may take, and the tenants above their quota.

    quotas  {_id: "*" or =tenant, tenant?, bytes, updated_at}

The result of an accepted job is never rejected: it cannot go anywhere else. Ingest enforces the quota instead: it lists
the tenants over their quota (ListUsage with `over_quota`) and rejects their new jobs. A payload is not rejected either,
because its job is accepted already; but its response says when the tenant is over the quota, so ingest reacts at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mesh.mongo import Document, translated
from services.store.documents import EARLIEST, Collections, whole_milliseconds
from services.store.limits import MAX_TENANT_CHARACTERS
from services.store.usage.counters import Counters
from services.store.usage.tenants import tenant_after
from services.store.usage.weight import Weight
from shoal.errors import InvalidArgument, ShoalError

log = logging.getLogger(__name__)

MAX_PAGE = 1_000
_MOST_BYTES = 1 << 60
_NOTHING: Mapping[str, Any] = {"results": 0, "bytes": 0, "recounted_at": EARLIEST}
_NO_MORE = Weight()


@dataclass(frozen=True)
class Usage:
    """Usage and quota of one tenant."""

    tenant: str
    results: int
    bytes: int
    """Bytes of results and payloads."""
    payloads: int
    payload_bytes: int
    quota_bytes: int | None
    """None: no quota."""
    recounted_at: datetime | None

    @property
    def is_over(self) -> bool:
        return self.quota_bytes is not None and self.bytes >= self.quota_bytes


class Quotas:
    """Sets quotas and reports usage."""

    def __init__(self, collections: Collections, counters: Counters, clock: Callable[[], datetime]) -> None:
        self._collections = collections
        self._counters = counters
        self._clock = clock

    async def put(self, tenant: str | None, most_bytes: int | None) -> None:
        """Set the quota of a tenant (None: of all tenants without one of their own), or remove it (None).

        Raises:
            InvalidArgument: the quota is not allowed.
        """
        if tenant is not None and len(tenant) > MAX_TENANT_CHARACTERS:
            raise InvalidArgument(f"tenant: {MAX_TENANT_CHARACTERS} characters at most, got {len(tenant)}")
        if most_bytes is not None and not 0 <= most_bytes <= _MOST_BYTES:
            raise InvalidArgument(f"bytes: expected 0 to {_MOST_BYTES}, got {most_bytes}")
        key = {"_id": _key(tenant)}
        with translated("setting a quota"):
            if most_bytes is None:
                await self._collections.quotas.delete_one(key)
                return
            doc: Document = {**key, "bytes": most_bytes, "updated_at": whole_milliseconds(self._clock())}
            named = doc if tenant is None else {**doc, "tenant": tenant}
            await self._collections.quotas.replace_one(key, named, upsert=True)

    async def list(self, after: str | None, size: int, *, over: bool = False) -> tuple[Sequence[Usage], str | None]:
        """Return `size` tenants by name, after `after`, and the name that ends the page (None: it is the last page).

        `over`: only tenants that have used up their quotas.
        """
        quotas = await self._quotas()
        query: Document = {"_id": {"$gt": after}} if after is not None else {}
        if over:
            if not quotas:
                return [], None
            query["bytes"] = {"$gte": min(quotas.values())}
        with translated("reading usage"):
            found = self._collections.usage.find(query)
            # Tenants over their quota are few and come in index order: they are sorted below.
            found = found.hint("by_bytes") if over else found.hint("_id_").sort("_id").limit(size + 1)
            docs = await found.to_list()
        all_ = sorted((_usage(doc, quotas) for doc in docs), key=lambda usage: usage.tenant)
        usages = [usage for usage in all_ if usage.is_over] if over else all_
        return usages[:size], usages[size - 1].tenant if len(usages) > size else None

    async def over(self, tenant: str) -> Usage | None:
        """Return the usage of a tenant that has used up its quota; None when it has not, or cannot be read now."""
        keys = {"_id": {"$in": [_key(None), _key(tenant)]}}
        try:
            with translated("reading the quota of a tenant"):
                found = await self._collections.quotas.find(keys).hint("_id_").to_list()
                doc = await self._collections.usage.find_one({"_id": tenant}) if found else None
            # Read last: a note that is added in between is missed for now, rather than counted twice.
            more = await self._counters.pending(tenant) if found else _NO_MORE
        except ShoalError as err:
            log.warning(
                "cannot check now whether tenant %(tenant)r is over its quota: %(error)s",
                {"event": "usage.quota_unknown", "tenant": tenant, "error": err},
            )
            return None
        usage = _usage(doc or {"_id": tenant, **_NOTHING}, _by_tenant(found), more)
        return usage if usage.is_over else None

    async def recount(self) -> None:
        """Recount every tenant's results and payloads: a minute or so for some millions."""
        after: str | None = None
        while (after := await tenant_after(self._collections, after)) is not None:
            await self._counters.recount(after)

    async def artifacts(self) -> tuple[int, int]:
        """Return the number of artifacts and their bytes: models, payloads and everything else that was stored."""
        sum_: Document = {"_id": None, "n": {"$sum": 1}, "b": {"$sum": "$size"}}
        steps: list[Document] = [{"$match": {"size": {"$gte": 0}}}, {"$group": sum_}]
        with translated("adding up artifacts"):
            found = await (await self._collections.artifacts.aggregate(steps, hint="by_size")).to_list()
        return (found[0]["n"], found[0]["b"]) if found else (0, 0)

    async def _quotas(self) -> Mapping[str | None, int]:
        with translated("reading quotas"):
            return _by_tenant(await self._collections.quotas.find({}).hint("_id_").to_list())


def _by_tenant(quotas: Sequence[Document]) -> Mapping[str | None, int]:
    return {doc.get("tenant"): doc["bytes"] for doc in quotas}


def _key(tenant: str | None) -> str:
    return "*" if tenant is None else f"={tenant}"


def _usage(doc: Document, quotas: Mapping[str | None, int], more: Weight = _NO_MORE) -> Usage:
    quota = quotas.get(doc["_id"], quotas.get(None))
    # A removal may be counted before the thing removed, so a counter can be negative for a moment.
    has = Weight(*(max(0, number) for number in vars(Weight.counted(doc) + more).values()))
    counted = None if doc["recounted_at"] == EARLIEST else doc["recounted_at"]
    return Usage(doc["_id"], **vars(has), quota_bytes=quota, recounted_at=counted)
