"""Filters of the gateway that follow the policy, as resources of ADS (ECDS): made once for each policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.config.rbac.v3 import Action  # noqa: F401 - from_dict needs it.
from envoy_data_plane.envoy.extensions.filters.http.jwt_authn.v3 import JwtAuthentication  # noqa: F401 - as above.
from envoy_data_plane.envoy.extensions.filters.http.rbac.v3 import Rbac  # noqa: F401 - as above.
from envoy_data_plane.envoy.type.matcher.v3 import HttpRequestHeaderMatchInput  # noqa: F401 - as above.

from mesh.xds import access
from mesh.xds.access import CALLERS, RULES
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


def gateway_access(policy: Policy | None, services: Sequence[str], revision: int = 0) -> GatewayAccess:
    """Return the part of a policy that a gateway enforces. Without a known policy the gateway refuses every call.

    A thousand revoked keys or rules take 0.1 s: call it in a thread.

    Args:
        services: gRPC services (`package.Service`) behind the gateway; all others are refused.
    """
    if policy is None:
        # The first filter passes everything on to the second.
        found = {CALLERS: {"@type": access.JWT}, RULES: access.closed_rules()}
        return GatewayAccess(tuple(_packed(name, config) for name, config in found.items()), revision=revision)
    web = Web(policy.hosts, policy.cors.origins)
    found = {CALLERS: access.callers(policy, services), RULES: access.rules(policy, services)}
    return GatewayAccess(tuple(_packed(name, config) for name, config in found.items()), web, revision)


def _packed(name: str, config: Mapping[str, Any]) -> Resource:
    fields = dict(access.extension(name, config))
    del fields["@type"]
    return pack(EXTENSION, name, TypedExtensionConfig.from_dict(fields))
