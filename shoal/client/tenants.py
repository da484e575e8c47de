"""`client.tenants`: shares and limits of tenants."""

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
"""Timeout of one page, which counts the waiting jobs of two hundred tenants."""
_PAGE = 200


@dataclass(frozen=True)
class TenantSettings:
    """Settings of a tenant. A field that is None inherits from the tenant `*`, or else from the node's default."""

    weight: float | None = None
    """Share relative to other waiting tenants; 0.01 to 100, 1 by default."""
    max_pending: int | None = None
    """Largest number of waiting jobs; 0 is no limit."""
    rate: float | None = None
    """Submits per second; 0 is no limit."""
    burst: float | None = None
    """Submits at once after a pause; 0 is one second's worth."""


@dataclass(frozen=True)
class Tenant:
    """Snapshot of a tenant at the time of the call."""

    name: str
    """Empty is the default tenant; `*` holds the settings of tenants without their own."""
    settings: TenantSettings
    """Own settings."""
    in_force: TenantSettings
    """Effective settings; every field is set."""
    pending: int = 0
    """Number of waiting jobs, counted up to 10,000."""
    pending_is_more: bool = False
    updated_at: datetime | None = None
    """Time of the last change of the settings."""


class AsyncTenants:
    """`client.tenants`: list, read and set tenants. A tenant is a name used at a submit; no creation is needed."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def list(self, *, limit: int = 1_000, timeout: float | None = TIMEOUT_S) -> builtins.list[Tenant]:
        """Return the tenants that have settings or waiting jobs, ordered by name."""
        found: builtins.list[Tenant] = []
        token, deadline = "", self._caller.deadline(timeout)
        while len(found) < limit:
            request = ingest.ListTenantsRequest(page_size=min(limit - len(found), _PAGE), page_token=token)
            response = await self._caller.call(methods.LIST_TENANTS, request, timeout_s=deadline, doing="list tenants")
            found += [_tenant(tenant) for tenant in response.tenants]
            token = response.next_page_token
            if not token:
                break
        return found[:limit]

    async def get(self, name: str, *, timeout: float | None = TIMEOUT_S) -> Tenant:
        """Return one tenant, also one without settings."""
        response = await self._caller.call(methods.GET_TENANT, ingest.GetTenantRequest(name=name), timeout_s=timeout)
        return _tenant(response.tenant)

    async def set(
        self,
        name: str,
        *,
        weight: float | None = None,
        max_pending: int | None = None,
        rate: float | None = None,
        burst: float | None = None,
        inherit: Iterable[str] = (),
        timeout: float | None = TIMEOUT_S,
    ) -> Tenant:
        """Change the settings that are not None; settings named in `inherit` follow `*` again.

        The change takes effect on every instance within about a second, also for waiting jobs.

        Raises:
            InvalidArgument: the message names the field, the expected value and the received one.
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
