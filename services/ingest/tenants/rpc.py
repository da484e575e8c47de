"""RPC methods for tenants: translation between messages and `TenantRepository`."""

from __future__ import annotations

from mesh.rpc.interceptors import Context
from services.ingest.messages import timestamp_of
from services.ingest.tenants.settings import NAMES, TenantLimits, TenantSettings, checked, checked_name
from services.ingest.tenants.tenant_repository import TenantRepository
from services.ingest.tenants.tenant_status import TenantStatus, TenantStatuses
from shoal.ingest.v1 import ingest_pb2 as pb


class TenantsRpc:
    """Mixin of the servicer with the methods for tenants."""

    def __init__(self, repository: TenantRepository, statuses: TenantStatuses) -> None:
        self._repository = repository
        self._statuses = statuses

    async def SetTenant(self, request: pb.SetTenantRequest, context: Context) -> pb.SetTenantResponse:
        name = checked_name(request.name)
        settings = checked(_settings(request.settings), request.inherit)
        await self._repository.change(name, settings, request.inherit)
        return pb.SetTenantResponse(tenant=_message(await self._statuses.of(name)))

    async def GetTenant(self, request: pb.GetTenantRequest, context: Context) -> pb.GetTenantResponse:
        return pb.GetTenantResponse(tenant=_message(await self._statuses.of(checked_name(request.name))))

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        statuses, token = await self._statuses.page(request.page_size, request.page_token)
        return pb.ListTenantsResponse(tenants=map(_message, statuses), next_page_token=token)


def _settings(message: pb.TenantSettings) -> TenantSettings:
    return TenantSettings(**{name: getattr(message, name) for name in NAMES if message.HasField(name)})


def _settings_message(values: TenantSettings | TenantLimits) -> pb.TenantSettings:
    return pb.TenantSettings(weight=values.weight, max_pending=values.max_pending, rate=values.rate, burst=values.burst)


def _message(status: TenantStatus) -> pb.Tenant:
    message = pb.Tenant(
        name=status.name,
        settings=_settings_message(status.settings),
        in_force=_settings_message(status.in_force),
        pending=status.pending,
        pending_is_more=status.pending_is_more,
    )
    if status.updated_at is not None:
        message.updated_at.CopyFrom(timestamp_of(status.updated_at))
    return message
