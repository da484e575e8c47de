"""Tenant scope of a call: the tenant whose objects the call may reach, and the caller that it acts for.

    x-shoal-caller ──Access──> the verified caller's tenant ──┐
    x-shoal-tenant, without a policy ─────────────────────────┴──> TenantScope ──> condition of every query

Callers of operating RPCs (tenants, limits, retention, backups) act for the installation, and services for all tenants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.rpc.access import Access, caller_in
from mesh.rpc.held_shares import CallLimits
from mesh.rpc.interceptors import Context
from shoal.access.caller_header import CALLER_HEADER
from shoal.access.rpc_groups import GROUP_OF, OPERATE
from shoal.errors import PermissionDenied
from shoal.tenant_header import TENANT_HEADER, UNNAMEABLE

_TENANT, _CALLER = TENANT_HEADER.encode(), CALLER_HEADER.encode()


@dataclass(frozen=True, slots=True)
class TenantScope:
    """Scope of one call."""

    tenant: str | None = None
    """None: the objects of every tenant."""
    caller: bytes = b""
    """The verified caller, as x-shoal-caller has it; empty without a policy, and for a service."""
    access: Access | None = None
    """Decides about the caller; None without a verified caller, who may do everything."""

    @property
    def condition(self) -> dict[str, Any]:
        """The condition that every query by id or filter has."""
        return {} if self.tenant is None else {"tenant": self.tenant}

    @property
    def verified_tenant(self) -> str | None:
        """The tenant of a verified caller; None without one."""
        return None if self.access is None else self.tenant

    def owner(self, field: str, named: str) -> str:
        """Return the tenant of an object or a filter whose message names `named`; empty: the scope's own.

        Raises:
            PermissionDenied: the message names another tenant than the scope's. The error names `field`.
        """
        if self.tenant is None or named == self.tenant:
            return named
        if named:
            raise PermissionDenied(
                f"{field}: expected {self.tenant!r}, the tenant of the caller, or none; got {named[:64]!r}"
            )
        return self.tenant

    def check(self, rpc: str, model: str) -> None:
        """Check that the caller may call `rpc` for `model`. Raises PermissionDenied, or Unauthenticated."""
        if self.access is not None:
            self.access.check(rpc, self.caller, model)

    def limits(self, model: str) -> CallLimits | None:
        """Return the limits of the policy in which a call for `model` counts; None: in none."""
        return None if self.access is None else self.access.limits_of(self.caller, model)

    def allows(self, rpc: str, model: str) -> bool:
        """Return True when the caller may call `rpc` for `model`."""
        return self.access is None or self.access.allows(rpc, self.caller, model)


EVERY_TENANT = TenantScope()
"""Scope of a service, and of a call without a tenant where no policy is set."""


class Scopes:
    """Scopes of the calls of one gRPC service, by its full name.

    `access` decides about callers; None: every caller may call every method, for the tenant that it names.
    """

    def __init__(self, service: str, access: Access | None = None) -> None:
        self._path = f"/{service}/"
        self._access = access

    def of(self, context: Context, method: str, *, behalf: bytes = b"") -> TenantScope:
        """Return the scope of a call of `method`. Raises PermissionDenied or Unauthenticated as `Access.check` does.

        Args:
            behalf: the caller for whom a service calls: the scope is that caller's. Only services may name one.
        """
        headers = dict(context.invocation_metadata() or ())
        scope = self._scope(method, _bytes(headers.get(TENANT_HEADER)), caller_in(context))
        if not behalf or self._access is None:
            return scope
        if scope.access is not None:
            raise PermissionDenied("caller: only a service may name another caller")
        return self._scope(method, None, behalf)

    def of_headers(self, headers: Mapping[bytes, bytes], method: str) -> TenantScope:
        """Return the scope of a call on the fast path. Raises as `of` does."""
        if self._access is None and _TENANT not in headers:
            return EVERY_TENANT
        return self._scope(method, headers.get(_TENANT), headers.get(_CALLER))

    def _scope(self, method: str, tenant: bytes | None, caller: bytes | None) -> TenantScope:
        if self._access is not None:
            rpc = self._path + method
            verified = self._access.check(rpc, caller)
            # Otherwise the caller is a service.
            if verified is not None and caller is not None:
                return TenantScope(None if GROUP_OF.get(rpc) == OPERATE else verified.tenant, caller, self._access)
        named = tenant.decode("latin-1") if tenant else ""
        return TenantScope(named) if named and named != UNNAMEABLE else EVERY_TENANT


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode("latin-1", "replace") if isinstance(value, str) else value
