"""What the client makes of tenants."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

import shoal
from shoal.client import Tenant, TenantSettings
from shoal.client.transport import methods
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as ingest
from tests.client.served import Served


class Tenants:
    """Keeps settings by name."""

    def __init__(self, served: Served) -> None:
        self.kept: dict[str, ingest.TenantSettings] = {}
        self.pages: list[int] = []
        served.on(methods.SET_TENANT, self.set)
        served.on(methods.GET_TENANT, self.get)
        served.on(methods.LIST_TENANTS, self.list)

    def tenant(self, name: str) -> ingest.Tenant:
        own = self.kept.get(name, ingest.TenantSettings())
        in_force = ingest.TenantSettings(weight=1, max_pending=0, rate=0, burst=0)
        in_force.MergeFrom(own)
        return ingest.Tenant(name=name, settings=own, in_force=in_force, pending=7)

    async def set(self, request: Any, context: Any) -> Any:
        kept = self.kept.setdefault(request.name, ingest.TenantSettings())
        kept.MergeFrom(request.settings)
        for name in request.inherit:
            kept.ClearField(name)
        return ingest.SetTenantResponse(tenant=self.tenant(request.name))

    async def get(self, request: Any, context: Any) -> Any:
        return ingest.GetTenantResponse(tenant=self.tenant(request.name))

    async def list(self, request: Any, context: Any) -> Any:
        self.pages.append(request.page_size)
        names = sorted(self.kept)
        first = int(request.page_token or 0)
        page = names[first : first + request.page_size]
        token = str(first + len(page)) if first + len(page) < len(names) else ""
        return ingest.ListTenantsResponse(tenants=map(self.tenant, page), next_page_token=token)


async def test_what_is_not_given_is_not_sent(served: Served) -> None:
    tenants = Tenants(served)
    async with shoal.AsyncClient(served.address) as client:
        set_ = await client.tenants.set("acme", weight=2.5, max_pending=0)
        assert set_ == Tenant(
            "acme", TenantSettings(weight=2.5, max_pending=0), TenantSettings(2.5, 0, 0, 0), pending=7
        )
        less = await client.tenants.set("acme", rate=3, inherit=["weight"])
        assert less.settings == TenantSettings(max_pending=0, rate=3)
        assert await client.tenants.get("acme") == less
        assert (await client.tenants.get("nobody")).settings == TenantSettings()
    assert set(tenants.kept) == {"acme"}


async def test_a_list_is_read_to_its_end_or_limit(served: Served) -> None:
    tenants = Tenants(served)
    tenants.kept = {f"t{n:04}": ingest.TenantSettings() for n in range(450)}
    async with shoal.AsyncClient(served.address) as client:
        assert [one.name for one in await client.tenants.list()] == sorted(tenants.kept)
        assert tenants.pages == [200, 200, 200]
        assert len(await client.tenants.list(limit=201)) == 201
        assert tenants.pages[3:] == [200, 1]


async def test_a_refusal_is_the_error_that_it_is(served: Served) -> None:
    async def refuse(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "settings.weight: 0.01 to 100, got 0")

    served.on(methods.SET_TENANT, refuse)
    async with shoal.AsyncClient(served.address) as client:
        with pytest.raises(InvalidArgument, match=r"settings\.weight: 0\.01 to 100, got 0"):
            await client.tenants.set("acme", weight=0)
