"""Rate limit of a tenant over all instances: one token bucket in MongoDB, from which instances take tokens in advance.

    bucket (level, at) ──take up to n──> tokens held by this instance ──one per submit──> ...

The database keeps the time and the level, so all instances together never get more tokens than the rate allows. Held
tokens expire after a second: in any time t, all instances together accept at most `burst + rate * (t + 1 s)` submits.
An instance takes as many tokens as submits wait, or about as many as it last used, at most a tenth of a second's worth,
so few tokens expire.
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
# A bucket without changes for an hour is full, because a burst is at most an hour's worth: its document expires.
_FORGOTTEN_S = 3_600
_PRUNE_AT = 1_000

_VALIDATOR: dict[str, Any] = {"$jsonSchema": {"bsonType": "object", "required": ["_id", "level", "at"]}}
_INDEXES = [IndexModel([("at", ASCENDING)], name="forgotten", expireAfterSeconds=_FORGOTTEN_S)]


@dataclass(slots=True)
class _HeldTokens:
    """Tokens of one tenant that this instance holds."""

    tokens: int = 0
    taken_at: float = 0.0
    used: int = 0
    """Tokens used since the last refill."""
    waiting: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    empty_until: float = float("-inf")
    """Time before which the bucket is empty, and a refill is useless."""
    refilled_under: TenantLimits | None = None
    """Limits at the last refill; under other limits the bucket may fill sooner."""


class Buckets:
    """Token buckets of tenants. `clock` is monotonic, in seconds."""

    def __init__(self, database: AsyncDatabase[Document], clock: Callable[[], float]) -> None:
        self._database = database
        self._buckets = database[BUCKETS]
        self._clock = clock
        self._held: dict[str, _HeldTokens] = {}

    async def open(self) -> None:
        """Create the collection.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        await ensure_collection(self._database, BUCKETS, validator=_VALIDATOR, indexes=_INDEXES)

    def has_tokens(self, tenant: str) -> bool:
        """Return True when this instance holds a token for `take_held`; otherwise call `take`."""
        held = self._held.get(tenant)
        return held is not None and held.tokens > 0 and self._clock() - held.taken_at <= HELD_S

    def take_held(self, tenant: str) -> None:
        """Use a held token."""
        held = self._held[tenant]
        held.tokens -= 1
        held.used += 1

    async def take(self, tenant: str, limits: TenantLimits) -> None:
        """Use a token, refilling the held ones if necessary.

        Raises:
            ResourceExhausted: the rate is used up; its retry-after is the time of the next token.
            Unavailable: MongoDB is unavailable.
        """
        held = self._held_of(tenant)
        held.waiting += 1
        try:
            # One caller refills for all concurrent ones.
            async with held.lock:
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
        # An upsert returns a document.
        assert bucket is not None
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
    """Return the update that fills a bucket by the database's clock, and takes up to `requested` whole tokens."""
    passed_ms = {"$max": [0, {"$subtract": ["$$NOW", {"$ifNull": ["$at", "$$NOW"]}]}]}
    filled = {"$add": [{"$ifNull": ["$level", limits.burst]}, {"$multiply": [passed_ms, limits.rate / 1000]}]}
    return [
        {"$set": {"level": {"$min": [limits.burst, filled]}, "at": {"$max": ["$at", "$$NOW"]}}},
        {"$set": {"granted": {"$floor": {"$min": ["$level", requested]}}}},
        {"$set": {"level": {"$subtract": ["$level", "$granted"]}}},
    ]
