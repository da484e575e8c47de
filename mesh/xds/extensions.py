"""Filters of the gateway that follow the policy, as resources of ADS (ECDS): made once for each policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.xds import ADS_CLUSTER, access, limits
from mesh.xds.access import CALLERS, RULES
from mesh.xds.messages import TypedExtensionConfig
from mesh.xds.resource import EXTENSION, Resource, pack
from mesh.xds.web import Web
from shoal.access.policy import Policy


@dataclass(frozen=True)
class GatewayAccess:
    """The gateway's part of a policy."""

    extensions: tuple[Resource, ...]
    web: Web = field(default_factory=Web)
    """Names by which clients reach the gateway, and pages that may call."""
    revision: int = 0
    """Revision of etcd of the policy; 0: there is none."""
    limit_filters: tuple[str, ...] = ()
    """Filters of limits that the routes enable: none without limits of requests."""


def gateway_access(policy: Policy | None, services: Sequence[str], revision: int = 0) -> GatewayAccess:
    """Return the part of a policy that a gateway enforces. Without a known policy the gateway refuses every call.

    A thousand revoked keys or rules take 0.1 s: call it in a thread.

    Args:
        services: gRPC services (`package.Service`) behind the gateway; all others are refused.
    """
    # Every filter has a configuration: without one, the listener would wait for it.
    quotas = dict(zip(limits.NAMES, limits.quotas(policy, ADS_CLUSTER), strict=True))
    if policy is None:
        # The first filter passes everything on to the second.
        found = {CALLERS: {"@type": access.JWT}, RULES: access.closed_rules()}
        return GatewayAccess(_all_packed({**found, **quotas}), revision=revision)
    callers = access.callers(policy, services, has_subject=limits.needs_subject(policy))
    found = {CALLERS: callers, RULES: access.rules(policy, services)}
    web = Web(policy.hosts, policy.cors.origins)
    filters = limits.NAMES[: limits.layers_of(policy)]
    return GatewayAccess(_all_packed({**found, **quotas}), web, revision, filters)


def _all_packed(found: Mapping[str, Mapping[str, Any]]) -> tuple[Resource, ...]:
    return tuple(_packed(name, config) for name, config in found.items())


def _packed(name: str, config: Mapping[str, Any]) -> Resource:
    fields = dict(access.extension(name, config))
    del fields["@type"]
    return pack(EXTENSION, name, TypedExtensionConfig.from_dict(fields))
