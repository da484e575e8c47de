"""Status of tenants for operators: settings, limits in force, queued jobs."""

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
"""Bound of the count of a tenant's jobs, which takes about ten milliseconds."""
PAGE_DEFAULT = 50
PAGE_MOST = 200
# Maximum tenant queues searched for tenants without settings: as many as fit in half a second.
_QUEUES_MOST = 100_000


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """Settings, limits and queued jobs of a tenant."""

    name: str
    settings: TenantSettings
    in_force: TenantLimits
    pending: int
    pending_is_more: bool
    updated_at: datetime | None


class TenantStatuses:
    """Reader of the status of tenants."""

    def __init__(self, jobs: AsyncCollection[Document], repository: TenantRepository, pending: PendingCounts) -> None:
        self._jobs = jobs
        self._repository = repository
        self._pending = pending

    async def of(self, name: str) -> TenantStatus:
        """Return the status of a tenant, with or without settings.

        Raises:
            Unavailable: MongoDB is unavailable.
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
        """Return a page of tenants with settings or queued jobs, by name, and the next page's token. `size` 0 means 50.

        Raises:
            InvalidArgument: a bad size or token. Unavailable: MongoDB is unavailable.
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
        """Return the tenants with queued jobs, at the cost of one step per tenant queue."""
        pipeline: list[Document] = [{"$match": WAITING}, *EACH_TENANT_QUEUE, {"$limit": _QUEUES_MOST}]
        with translated("listing tenants with queued jobs"):
            found = await self._jobs.aggregate(pipeline, hint="lanes")
            return [tenant_queue_of(document["_id"]).tenant async for document in found]


def _token(after: str) -> str:
    return base64.urlsafe_b64encode(after.encode()).decode() or "="


def _read_token(token: str) -> str:
    try:
        return "" if token == "=" else base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        raise InvalidArgument("page_token: not the next_page_token of a page of tenants") from None
