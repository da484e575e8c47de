"""`client.tenants`: shares and limits of those who submit jobs."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from shoal.client.models.registry import of_time
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.ingest.v1 import ingest_pb2 as ingest

TIMEOUT_S = 30.0
"""A page counts the waiting jobs of two hundred tenants."""
_AT_ONCE = 200


@dataclass(frozen=True)
class TenantSettings:
    """None where nothing is set: then what the tenant `*` has is in force, or else the node's default."""

    weight: float | None = None
    """Its share beside other tenants that wait; 0.01 to 100, 1 by default."""
    max_pending: int | None = None
    """Jobs that may wait; 0 is no limit."""
    rate: float | None = None
    """Submits per second; 0 is no limit."""
    burst: float | None = None
    """Submits at once after a pause; 0 is a second's worth."""


@dataclass(frozen=True)
class Tenant:
    """A tenant as it stood when the node was asked."""

    name: str
    """Empty is the default tenant; `*` is everyone who does not say otherwise."""
    settings: TenantSettings
    """Its own."""
    in_force: TenantSettings
    """What holds for it; every field is set."""
    pending: int = 0
    """Its jobs that wait, counted up to 10,000."""
    pending_is_more: bool = False
    updated_at: datetime | None = None
    """When its settings were changed last."""


class AsyncTenants:
    """Tenants are names that jobs are submitted under: none has to be made first."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def list(self, *, limit: int = 1_000, timeout: float = TIMEOUT_S) -> builtins.list[Tenant]:
        """Those that have settings, or jobs that wait, by name."""
        found: builtins.list[Tenant] = []
        token = ""
        while len(found) < limit:
            request = ingest.ListTenantsRequest(page_size=min(limit - len(found), _AT_ONCE), page_token=token)
            answer = await self._caller.call(methods.LIST_TENANTS, request, timeout_s=timeout, doing="list tenants")
            found += [_tenant(tenant) for tenant in answer.tenants]
            token = answer.next_page_token
            if not token:
                break
        return found[:limit]

    async def get(self, name: str, *, timeout: float = TIMEOUT_S) -> Tenant:
        """One tenant, also when nobody has set anything for it."""
        answer = await self._caller.call(methods.GET_TENANT, ingest.GetTenantRequest(name=name), timeout_s=timeout)
        return _tenant(answer.tenant)

    async def set(
        self,
        name: str,
        *,
        weight: float | None = None,
        max_pending: int | None = None,
        rate: float | None = None,
        burst: float | None = None,
        inherit: Iterable[str] = (),
        timeout: float = TIMEOUT_S,
    ) -> Tenant:
        """Changes what is given, and leaves the rest; fields named in `inherit` are what `*` has again.

        It counts on every instance within about a second, for jobs that wait already too.

        Raises:
            InvalidArgument: names the field, what was expected and what came.
        """
        settings = ingest.TenantSettings(weight=weight, max_pending=max_pending, rate=rate, burst=burst)
        request = ingest.SetTenantRequest(name=name, settings=settings, inherit=inherit)
        return _tenant((await self._caller.call(methods.SET_TENANT, request, timeout_s=timeout)).tenant)


def _tenant(message: ingest.Tenant) -> Tenant:
    return Tenant(
        name=message.name,
        settings=_settings(message.settings),
        in_force=_settings(message.in_force),
        pending=message.pending,
        pending_is_more=message.pending_is_more,
        updated_at=of_time(message, "updated_at"),
    )


def _settings(message: ingest.TenantSettings) -> TenantSettings:
    return TenantSettings(
        weight=message.weight if message.HasField("weight") else None,
        max_pending=message.max_pending if message.HasField("max_pending") else None,
        rate=message.rate if message.HasField("rate") else None,
        burst=message.burst if message.HasField("burst") else None,
    )
