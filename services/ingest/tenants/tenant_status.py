"""Tenants as operators see them: what is set, what is in force, what waits."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from services.ingest.documents import EACH_TENANT_QUEUE, WAITING
from services.ingest.tenant_queue import tenant_queue_of
from services.ingest.tenants.pending import PendingCounts
from services.ingest.tenants.settings import TenantLimits, TenantSettings
from services.ingest.tenants.tenant_repository import TenantRepository
from shoal.errors import InvalidArgument

COUNTED_MOST = 10_000
"""A tenant's jobs are counted so far: about ten milliseconds."""
PAGE_DEFAULT = 50
PAGE_MOST = 200
_LANES_MOST = 100_000
# Lanes looked through for tenants that nobody has set: as many as fit in half a second.


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """How a tenant stands."""

    name: str
    settings: TenantSettings
    in_force: TenantLimits
    pending: int
    pending_is_more: bool
    updated_at: datetime | None


class TenantStatuses:
    """Reads how tenants stand."""

    def __init__(self, jobs: AsyncCollection[Document], repository: TenantRepository, pending: PendingCounts) -> None:
        self._jobs = jobs
        self._repository = repository
        self._pending = pending

    async def of(self, name: str) -> TenantStatus:
        """How one stands, also one that nobody has set.

        Raises:
            Unavailable: MongoDB is away.
        """
        counted = await self._pending.count(name, COUNTED_MOST + 1)
        known = self._repository.get(name)
        return TenantStatus(
            name,
            known.settings if known else TenantSettings(),
            self._repository.limits(name),
            min(counted, COUNTED_MOST),
            counted > COUNTED_MOST,
            known.updated_at if known else None,
        )

    async def page(self, size: int, token: str) -> tuple[list[TenantStatus], str]:
        """Those that are set, or have jobs that wait, by name; and the token of the next page. `size` 0 means 50.

        Raises:
            InvalidArgument: a bad size or token. Unavailable: MongoDB is away.
        """
        if not 0 <= size <= PAGE_MOST:
            raise InvalidArgument(f"page_size: 0 (the default, {PAGE_DEFAULT}) to {PAGE_MOST}, got {size}")
        after = _read_token(token) if token else None
        names = sorted(
            name for name in {*self._repository.names(), *await self._waiting()} if after is None or name > after
        )
        page = names[: size or PAGE_DEFAULT]
        statuses = [await self.of(name) for name in page]
        return statuses, _token(page[-1]) if len(names) > len(page) else ""

    async def _waiting(self) -> Sequence[str]:
        """The tenants that have jobs that wait: one step a lane."""
        lanes: list[Document] = [{"$match": WAITING}, *EACH_TENANT_QUEUE, {"$limit": _LANES_MOST}]
        with translated("looking for tenants that wait"):
            found = await self._jobs.aggregate(lanes, hint="lanes")
            return [tenant_queue_of(document["_id"]).tenant async for document in found]


def _token(after: str) -> str:
    return base64.urlsafe_b64encode(after.encode()).decode() or "="


def _read_token(token: str) -> str:
    try:
        return "" if token == "=" else base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        raise InvalidArgument("page_token: not the next_page_token of a page of tenants") from None
