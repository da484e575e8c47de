"""Settings of tenants in MongoDB, with a copy in memory: submits and claims cannot query the database each time.

    SetTenant ──> tenants (one document each) ──changes, every second──> TenantRepository ──> limits, from memory

An instance applies a change within about a second. Settings are never removed: an empty document has the same effect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from pymongo import ASCENDING, IndexModel, ReturnDocument
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document, ensure_collection, translated
from mesh.process.tasks import Background, for_ever
from services.ingest.documents import EPOCH
from services.ingest.tenants.settings import EVERYONE, NAMES, Tenant, TenantLimits, TenantSettings, in_force
from shoal.errors import FailedPrecondition

log = logging.getLogger(__name__)

TENANTS = "tenants"
MOST = 10_000
"""Maximum number of tenants with settings: all of them are kept in memory."""
READ_S = 1.0
# A change has the database's time at its begin, and may become visible to readers this much later.
_OVERLAP = timedelta(seconds=10)

_VALIDATOR = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["_id", "updated_at"],
        "properties": {"_id": {"bsonType": "string"}, "updated_at": {"bsonType": "date"}},
    }
}
_INDEXES = [IndexModel([("updated_at", ASCENDING)], name="changed")]


class TenantRepository(Background):
    """Settings of tenants. Used as `async with`, which reads changes in the background after `open`."""

    def __init__(self, database: AsyncDatabase[Document], *, read_s: float = READ_S) -> None:
        self._database = database
        self._tenants = database[TENANTS]
        self._read_s = read_s
        self._known: dict[str, Tenant] = {}
        self._limits: dict[str, TenantLimits] = {}
        self._others = TenantLimits()
        self._read_to: datetime = EPOCH
        self._is_open = asyncio.Event()

    async def open(self) -> None:
        """Create the collection, read it, and begin to follow its changes.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        await ensure_collection(self._database, TENANTS, validator=_VALIDATOR, indexes=_INDEXES)
        await self.read()
        self._is_open.set()

    def limits(self, tenant: str) -> TenantLimits:
        """Return the limits that apply to `tenant`."""
        return self._limits.get(tenant, self._others)

    def weight(self, tenant: str) -> float:
        """Return the fair-queueing weight of `tenant`."""
        return self.limits(tenant).weight

    def get(self, name: str) -> Tenant | None:
        """Return the settings of a tenant, as this instance knows them; None when there are none."""
        return self._known.get(name)

    def names(self) -> Collection[str]:
        """Return the names of the tenants with settings."""
        return self._known.keys()

    async def change(self, name: str, settings: TenantSettings, inherit: Collection[str]) -> Tenant:
        """Write the set fields of `settings`, and remove the fields named in `inherit`.

        Raises:
            FailedPrecondition: too many tenants. Unavailable: MongoDB is unavailable.
        """
        if name not in self._known and len(self._known) >= MOST:
            raise FailedPrecondition(f"{MOST} tenants have settings already: let others inherit from {EVERYONE!r}")
        update: dict[str, Any] = {"$currentDate": {"updated_at": True}}
        if set_values := settings.set_values():
            update["$set"] = set_values
        if inherit:
            update["$unset"] = dict.fromkeys(inherit, "")
        with translated("changing a tenant's settings"):
            document = await self._tenants.find_one_and_update(
                {"_id": name}, update, upsert=True, return_document=ReturnDocument.AFTER
            )
        # An upsert returns a document.
        assert document is not None
        tenant = _tenant(document)
        self._update([tenant])
        return tenant

    async def read(self) -> None:
        """Read the changes.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        with translated("reading the tenants"):
            changed = self._tenants.find({"updated_at": {"$gt": self._read_to}})
            found = [_tenant(document) async for document in changed]
        if found:
            self._read_to = max(self._read_to, max(tenant.updated_at for tenant in found) - _OVERLAP)
            self._update(found)

    def _update(self, tenants: Collection[Tenant]) -> None:
        changed = [tenant for tenant in tenants if self._is_newer(tenant)]
        if not changed:
            return
        self._known.update((tenant.name, tenant) for tenant in changed)
        everyone = self._known.get(EVERYONE)
        common = everyone.settings if everyone else None
        self._others = in_force(None, common)
        self._limits = {name: in_force(tenant.settings, common) for name, tenant in self._known.items()}

    def _is_newer(self, tenant: Tenant) -> bool:
        known = self._known.get(tenant.name)
        return known is None or (known != tenant and known.updated_at <= tenant.updated_at)

    async def _run(self) -> None:
        await self._is_open.wait()
        await asyncio.sleep(self._read_s)
        await for_ever("read the tenants", self._read_once, away_s=self._read_s, log=log, level=logging.INFO)

    async def _read_once(self) -> float:
        await self.read()
        return self._read_s


def _tenant(document: Document) -> Tenant:
    settings = TenantSettings(**{name: document[name] for name in NAMES if name in document})
    return Tenant(document["_id"], settings, document["updated_at"])
