"""Clusters: one for each service, one for each model, and their endpoints.

Fields: envoy.config.cluster.v3.Cluster and envoy.config.endpoint.v3.ClusterLoadAssignment. The numbers were chosen with
a real Envoy and `kill -9` of one of two replicas under load: no call failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

from envoy_data_plane.envoy.config.cluster.v3 import Cluster, OutlierDetection
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptions

from mesh.xds.resource import CLUSTER, ENDPOINTS, Resource, pack, pack_serialized, typed

MODEL_PREFIX = "model/"
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = (1 << 31) - 1
# All calls to an instance share one connection. What has come for a client that does not read takes up a stream's
# window of the connection's: by default two such clients take all of it, and no call there is answered any more.
_CACHED = 8192
# Resources that are kept packed. Building one costs up to a millisecond of the event loop's time.


@dataclass(frozen=True, order=True)
class Endpoint:
    """Where one instance is reached: `unix:/path` or `host:port`."""

    address: str
    draining: bool = False
    """It gets nothing new; what runs there may finish."""


def model_cluster(model: str) -> str:
    """The name of a model's cluster."""
    return MODEL_PREFIX + model


def address(text: str) -> dict[str, Any]:
    """envoy.config.core.v3.Address of `unix:/path` or `host:port`."""
    if text.startswith("unix:"):
        return {"pipe": {"path": text.removeprefix("unix:")}}
    host, _, port = text.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


@lru_cache(_CACHED)
def cluster(name: str, *, is_sticky: bool = False) -> Resource:
    """The cluster `name`; its endpoints come over EDS. `is_sticky`: equal hashes go to one endpoint."""
    common = _cluster(is_model=name.startswith(MODEL_PREFIX), is_sticky=is_sticky)
    return pack_serialized(CLUSTER, name, bytes(Cluster(name=name)) + common)


@lru_cache(4)
def _cluster(*, is_model: bool, is_sticky: bool) -> bytes:
    """All of a cluster but its name, serialized."""
    message = Cluster.from_dict(
        {
            "type": "EDS",
            "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}},
            "connect_timeout": "1s",
            # A ring: when an endpoint comes or goes, the least possible moves to another one.
            "lb_policy": "RING_HASH" if is_sticky else "LEAST_REQUEST",
            "typed_extension_protocol_options": http2(),
            "circuit_breakers": {"thresholds": [_limits("DEFAULT"), _limits("HIGH")]},
            "health_checks": [] if is_model else [_health_check()],
            # Without this an endpoint that coord has taken out stays in until its health check fails.
            "ignore_health_on_host_removal": True,
            "common_lb_config": {
                # Panic mode would send calls to drained endpoints and to dead ones.
                "healthy_panic_threshold": {"value": 0},
                # One change of the endpoints at a time is enough to see each at once.
                "update_merge_window": "0s",
            },
        }
    )
    message.outlier_detection = _outlier_detection()
    return bytes(message)


@lru_cache(_CACHED)
def endpoints(name: str, found: tuple[Endpoint, ...]) -> Resource:
    """The endpoints of cluster `name`."""
    lb_endpoints = [
        {
            "endpoint": {"address": address(endpoint.address)},
            "health_status": "DRAINING" if endpoint.draining else "HEALTHY",
        }
        for endpoint in found
    ]
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": lb_endpoints}] if lb_endpoints else []}
    return pack(ENDPOINTS, name, ClusterLoadAssignment.from_dict(assignment))


def http2() -> dict[str, Any]:
    """Typed options of a cluster that speaks HTTP/2, and notices an upstream that is frozen."""
    options = {
        # Not more often than every second: our servers take that for abuse and close the connection.
        "connection_keepalive": {"interval": "2s", "timeout": "5s"},
        "initial_stream_window_size": STREAM_WINDOW,
        "initial_connection_window_size": CONNECTION_WINDOW,
    }
    protocol = {"explicit_http_config": {"http2_protocol_options": options}}
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(HttpProtocolOptions, protocol)}


def _health_check() -> dict[str, Any]:
    """Asks each instance itself whether it serves.

    For clusters of services only: a node may have hundreds of models, each with a cluster of the same few instances.
    Those rely on membership (an instance names a model once it is ready), outlier detection and retries.
    """
    return {
        "interval": "0.5s",
        "no_traffic_interval": "0.5s",
        # A killed process refuses at once; this is for one that is busy, whose calls would be cut for nothing.
        "timeout": "2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "grpc_health_check": {},
    }


def _limits(priority: str) -> dict[str, Any]:
    """Limits that never bite: services bound their own queues and say RESOURCE_EXHAUSTED with a time to come back.

    `max_retries` is 3 by default, for the whole cluster at once: kill one with 32 calls in flight, and 29 of
    them fail.
    """
    return {
        "priority": priority,
        "max_connections": 10_000,
        "max_pending_requests": 100_000,
        "max_requests": 100_000,
        "max_retries": 10_000,
    }


def _outlier_detection() -> OutlierDetection:
    """Leaves an endpoint out for a moment when connections to it fail.

    Statuses do not count. Envoy reads INTERNAL and DEADLINE_EXCEEDED as 5xx: five bad requests of one client would take
    a good instance from all.
    """
    return OutlierDetection(
        # Built, not `from_dict`, which cannot spell consecutive_5xx.
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=2,
        enforcing_consecutive_local_origin_failure=100,
        enforcing_consecutive_5xx=0,
        enforcing_consecutive_gateway_failure=0,
        enforcing_success_rate=0,
        enforcing_local_origin_success_rate=0,
        max_ejection_percent=50,  # Never the last one: better a try than no try.
        interval=timedelta(seconds=1),
        base_ejection_time=timedelta(seconds=1),
        max_ejection_time=timedelta(seconds=5),
    )
