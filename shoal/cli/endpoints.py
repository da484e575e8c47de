"""Envoy's view of every endpoint, read from the admin address of a node (`/clusters?format=json`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from shoal.cli import admin_page
from shoal.errors import Unavailable

TIMEOUT_S = 5.0
"""Timeout of a read, which Envoy serves from memory."""


@dataclass(frozen=True)
class Endpoint:
    """Endpoint of a cluster: health and request counts."""

    cluster: str
    address: str
    health: str
    """`healthy`, or the reasons why Envoy sends it no requests."""
    active_requests: int
    total_requests: int
    failed_requests: int

    @property
    def healthy(self) -> bool:
        """True when Envoy sends requests to the endpoint."""
        return self.health == "healthy"


def fetch(admin: str) -> list[Endpoint]:
    """Return the endpoints that the Envoy of the node with this admin address knows, ordered by cluster and address.

    Raises:
        Unavailable: the node does not answer, or not with endpoints.
    """
    try:
        return of_document(json.loads(admin_page.read(admin, "/clusters?format=json", timeout_s=TIMEOUT_S)))
    except ValueError as err:
        raise Unavailable(f"the admin address {admin} is not that of a node: {err}") from err


def by_instance(endpoints: Iterable[Endpoint]) -> dict[str, tuple[int, int]]:
    """Return the requests that were sent to each instance of the node, and how many of them failed for Envoy."""
    found: dict[str, tuple[int, int]] = {}
    for endpoint in endpoints:
        # Instances of the node listen at unix sockets of their name.
        name = PurePath(endpoint.address).stem
        total, failed = found.get(name, (0, 0))
        found[name] = (total + endpoint.total_requests, failed + endpoint.failed_requests)
    return found


def of_document(document: Mapping[str, Any]) -> list[Endpoint]:
    """Return the endpoints in Envoy's response (envoy.admin.v3.Clusters as JSON)."""
    found = [
        _endpoint(cluster.get("name", ""), host)
        for cluster in document.get("cluster_statuses", ())
        for host in cluster.get("host_statuses", ())
    ]
    return sorted(found, key=lambda endpoint: (endpoint.cluster, endpoint.address))


def _endpoint(cluster: str, host: Mapping[str, Any]) -> Endpoint:
    stats = {stat.get("name"): int(stat.get("value", 0)) for stat in host.get("stats", ())}
    return Endpoint(
        cluster=cluster,
        address=_address(host.get("address", {})),
        health=_health(host.get("health_status", {})),
        active_requests=stats.get("rq_active", 0),
        total_requests=stats.get("rq_total", 0),
        # Envoy counts failed connections as failed requests, even when there was no request to send.
        failed_requests=max(0, stats.get("rq_error", 0) - stats.get("cx_connect_fail", 0)),
    )


def _address(address: Mapping[str, Any]) -> str:
    if "pipe" in address:
        return f"unix:{address['pipe'].get('path', '')}"
    socket = address.get("socket_address", {})
    return f"{socket.get('address', '')}:{socket.get('port_value', '')}"


def _health(status: Mapping[str, Any]) -> str:
    reasons = [key.replace("_", " ") for key, value in sorted(status.items()) if value is True]
    eds = status.get("eds_health_status", "HEALTHY")
    if eds not in ("HEALTHY", "UNKNOWN"):
        reasons.insert(0, str(eds).lower())
    return ", ".join(reasons) or "healthy"
