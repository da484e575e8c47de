"""Envoy's part of the policy of `shoal serve`: files that Envoy re-reads by itself. Their content: mesh.xds.access."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mesh.process.files import write_atomically
from mesh.xds import access
from mesh.xds.access import CALLERS, RULES
from mesh.xds.web import Web, virtual_hosts
from shoal.access.policy import Policy

_ROUTES = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
HOSTS = "shoal.hosts"
REJECTED = tuple(f"extension_config_discovery.http_filter.{name}.update_rejected" for name in (CALLERS, RULES))
"""Counters of parts of policies that Envoy has refused. It keeps the former ones."""


def connection_manager(folder: Path) -> dict[str, Any]:
    """Return the fields of a connection manager that takes callers, rules and host names from files in `folder`."""
    return {
        "early_header_mutation_extensions": [access.removal()],
        "rds": {"route_config_name": HOSTS, "config_source": _file(folder, HOSTS)},
        "http_filters": access.filters(lambda name: _file(folder, name)),
    }


def write(policy: Policy, folder: Path, services: Sequence[str], virtual_host: Mapping[str, Any]) -> None:
    """Write the files of a policy, each as a whole. Envoy has them within a tenth of a second.

    Args:
        services: gRPC services (`package.Service`) behind Envoy; all others are refused.
        virtual_host: Envoy's virtual host for the calls, without its name and domains.
    """
    _replace(folder, CALLERS, access.extension(CALLERS, access.callers(policy, services)))
    _replace(folder, RULES, access.extension(RULES, access.rules(policy, services)))
    _replace(folder, HOSTS, {"@type": _ROUTES, "name": HOSTS, **hosts(policy, virtual_host)})


def hosts(policy: Policy, virtual_host: Mapping[str, Any]) -> dict[str, Any]:
    """Return the route configuration: `virtual_host` for the host names and web pages of the policy."""
    removed = [*virtual_host.get("request_headers_to_remove", ()), *access.TOKEN_REMOVAL["request_headers_to_remove"]]
    served = {**virtual_host, **access.TOKEN_REMOVAL, "request_headers_to_remove": removed}
    named = virtual_hosts(Web(policy.hosts, policy.cors.origins), served)
    return {"virtual_hosts": named, "ignore_port_in_host_matching": True}


def _file(folder: Path, name: str) -> dict[str, Any]:
    return {"path_config_source": {"path": str(folder / f"{name}.json")}, "resource_api_version": "V3"}


def _replace(folder: Path, name: str, resource: Mapping[str, Any]) -> None:
    version = hashlib.sha256(json.dumps(resource).encode()).hexdigest()[:16]
    # Envoy notices a file that is moved to the path, and not one that is written there.
    write_atomically(folder / f"{name}.json", json.dumps({"version_info": version, "resources": [resource]}))
