"""A rate for a tenant, over all instances: one token bucket in MongoDB, of which each instance takes a few at a time.

    bucket (level, at) ──take up to n──> in hand here ──one a submit──> ...

The database keeps the time and the level, so that however many instances take, no more is handed out than the rate
allows. What is in hand and not used within a second is thrown away: in any time t, all instances together accept no
more than `burst + rate * (t + 1 s)`. An instance takes what waits, or about as much as it used of the last, a tenth of
a second's worth, so little is thrown away.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pymongo import ASCENDING, IndexModel, ReturnDocument
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, ensure_collection, translated
from services.ingest.tenants.settings import TenantLimits
from shoal.errors import ResourceExhausted

BUCKETS = "tenant_rates"
HELD_S = 1.0
_AHEAD_S = 0.1
_FORGOTTEN_S = 3_600
# A bucket that was not touched for an hour is full: a burst is at most an hour's worth.
_PRUNE_AT = 1_000

_VALIDATOR: dict[str, Any] = {"$jsonSchema": {"bsonType": "object", "required": ["_id", "level", "at"]}}
_INDEXES = [IndexModel([("at", ASCENDING)], name="forgotten", expireAfterSeconds=_FORGOTTEN_S)]


@dataclass(slots=True)
class _HeldTokens:
    """What this instance has taken for one tenant."""

    tokens: int = 0
    taken_at: float = 0.0
    used: int = 0
    """Since the last time that some were taken."""
    waiting: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    empty_until: float = float("-inf")
    """The bucket has none before then: it need not be asked."""
    refilled_under: TenantLimits | None = None
    """What held then; under another rate the bucket fills sooner."""


class Buckets:
    """The rates of tenants. `clock` is monotonic, in seconds."""

    def __init__(self, database: AsyncDatabase[Document], clock: Callable[[], float]) -> None:
        self._database = database
        self._buckets = database[BUCKETS]
        self._clock = clock
        self._held: dict[str, _HeldTokens] = {}

    async def open(self) -> None:
        """Makes the collection.

        Raises:
            Unavailable: MongoDB is away.
        """
        await ensure_collection(self._database, BUCKETS, validator=_VALIDATOR, indexes=_INDEXES)

    def has_tokens(self, tenant: str) -> bool:
        """Whether there is one that `take_at_hand` may take; else `take` has to be asked."""
        held = self._held.get(tenant)
        return held is not None and held.tokens > 0 and self._clock() - held.taken_at <= HELD_S

    def take_held(self, tenant: str) -> None:
        """Takes one that is at hand."""
        held = self._held[tenant]
        held.tokens -= 1
        held.used += 1

    async def take(self, tenant: str, limits: TenantLimits) -> None:
        """Takes one.

        Raises:
            ResourceExhausted: the rate is used up; says when there is one again.
            Unavailable: MongoDB is away.
        """
        held = self._held_of(tenant)
        held.waiting += 1
        try:
            async with held.lock:  # One asks for all that wait.
                if not self.has_tokens(tenant) and (self._clock() >= held.empty_until or limits != held.refilled_under):
                    await self._refill(tenant, held, limits)
                if not self.has_tokens(tenant):
                    raise ResourceExhausted(
                        f"tenant {tenant!r} submits more than its {limits.rate:g} jobs a second: slow down",
                        retry_after_ms=max(1, math.ceil((held.empty_until - self._clock()) * 1000)),
                    )
                self.take_held(tenant)
        finally:
            held.waiting -= 1

    async def _refill(self, tenant: str, held: _HeldTokens, limits: TenantLimits) -> None:
        requested = max(held.waiting, min(held.used, int(limits.rate * _AHEAD_S)))
        with translated("taking from a tenant's rate"):
            bucket = await self._buckets.find_one_and_update(
                {"_id": tenant}, taking(limits, requested), upsert=True, return_document=ReturnDocument.AFTER
            )
        assert bucket is not None  # It was upserted.
        held.tokens, held.taken_at, held.used = int(bucket["granted"]), self._clock(), 0
        held.empty_until, held.refilled_under = held.taken_at + max(0.0, 1 - bucket["level"]) / limits.rate, limits

    def _held_of(self, tenant: str) -> _HeldTokens:
        if len(self._held) >= _PRUNE_AT and tenant not in self._held:
            now = self._clock()
            self._held = {
                name: held for name, held in self._held.items() if held.waiting or now - held.taken_at <= HELD_S
            }
        return self._held.setdefault(tenant, _HeldTokens())


def taking(limits: TenantLimits, requested: int) -> list[Document]:
    """An update that fills a bucket up to now, by the database's clock, and takes up to `ask` whole tokens from it."""
    passed_ms = {"$max": [0, {"$subtract": ["$$NOW", {"$ifNull": ["$at", "$$NOW"]}]}]}
    filled = {"$add": [{"$ifNull": ["$level", limits.burst]}, {"$multiply": [passed_ms, limits.rate / 1000]}]}
    return [
        {"$set": {"level": {"$min": [limits.burst, filled]}, "at": {"$max": ["$at", "$$NOW"]}}},
        {"$set": {"granted": {"$floor": {"$min": ["$level", requested]}}}},
        {"$set": {"level": {"$subtract": ["$level", "$granted"]}}},
    ]
