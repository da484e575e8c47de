"""Clusters: one for each service, one for each model, and their endpoints.

Fields: envoy.config.cluster.v3.Cluster and envoy.config.endpoint.v3.ClusterLoadAssignment. The timeouts and limits were
tuned with a real Envoy and `kill -9` of one of two replicas under load: no call failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

from mesh.xds.messages import Cluster, ClusterLoadAssignment, HttpProtocolOptions, OutlierDetection
from mesh.xds.resource import CLUSTER, ENDPOINTS, Resource, pack, pack_serialized, typed

MODEL_PREFIX = "model/"
STREAM_WINDOW = 1 << 20
# The plain calls of a worker thread to an instance share one connection, and so do streams. Unread data of a slow
# client uses a stream's window, and counts against the connection's window too. With Envoy's default, two slow clients
# would block all others.
CONNECTION_WINDOW = (1 << 31) - 1
# Number of packed resources to cache. Building one blocks the event loop for up to a millisecond.
_CACHED = 8192


@dataclass(frozen=True, order=True)
class Endpoint:
    """Address of one instance, and its drain state."""

    address: str
    """`unix:/path` or `host:port`."""
    draining: bool = False
    """True when the endpoint gets no new calls; running calls may finish."""


def model_cluster(model: str) -> str:
    """Return the name of a model's cluster."""
    return MODEL_PREFIX + model


def address(text: str) -> dict[str, Any]:
    """Return the envoy.config.core.v3.Address of `unix:/path` or `host:port`, as a dict."""
    if text.startswith("unix:"):
        return {"pipe": {"path": text.removeprefix("unix:")}}
    host, _, port = text.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


@lru_cache(_CACHED)
def cluster(name: str, *, is_sticky: bool = False, tries_unhealthy: bool = False) -> Resource:
    """Build the cluster `name`, whose endpoints Envoy gets over EDS.

    With `is_sticky`, all calls with one hash go to one endpoint. With `tries_unhealthy`, a call goes to any endpoint
    when none is healthy.
    """
    is_model = name.startswith(MODEL_PREFIX)
    common = _cluster(is_model=is_model, is_sticky=is_sticky, tries_unhealthy=tries_unhealthy)
    return pack_serialized(CLUSTER, name, bytes(Cluster(name=name)) + common)


@lru_cache(8)
def _cluster(*, is_model: bool, is_sticky: bool, tries_unhealthy: bool) -> bytes:
    """Return the serialized fields of a cluster, without its name."""
    message = Cluster.from_dict(
        {
            "type": "EDS",
            "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}},
            "connect_timeout": "1s",
            # With a hash ring, a new or removed endpoint moves the fewest sequences.
            "lb_policy": "RING_HASH" if is_sticky else "LEAST_REQUEST",
            "typed_extension_protocol_options": http2(),
            "circuit_breakers": {"thresholds": [_limits("DEFAULT"), _limits("HIGH")]},
            "health_checks": [] if is_model else [_health_check()],
            # Otherwise Envoy keeps an endpoint that coord has removed until its health check fails.
            "ignore_health_on_host_removal": True,
            "common_lb_config": {
                # Panic mode sends calls to drained and dead endpoints: at 0, never; at 1, when none is healthy.
                "healthy_panic_threshold": {"value": int(tries_unhealthy)},
                # Apply each change of the endpoints immediately, without merging.
                "update_merge_window": "0s",
            },
        }
    )
    message.outlier_detection = _outlier_detection()
    return bytes(message)


@lru_cache(_CACHED)
def endpoints(name: str, found: tuple[Endpoint, ...]) -> Resource:
    """Build the endpoints resource (ClusterLoadAssignment) of cluster `name`."""
    lb_endpoints = [
        {
            "endpoint": {"address": address(endpoint.address)},
            "health_status": "DRAINING" if endpoint.draining else "HEALTHY",
        }
        for endpoint in found
    ]
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": lb_endpoints}] if lb_endpoints else []}
    return pack(ENDPOINTS, name, ClusterLoadAssignment.from_dict(assignment))


MAX_FRAMES = 1 << 30
"""Frames that wait for an upstream to read. At 10,000, the default, Envoy closes the connection with all calls on it:
one client that sends a body byte by byte would end the calls of others. Watermarks bound the bytes. Of control frames
the default is 1,000: a client that leaves has all its calls reset at once."""


def http2() -> dict[str, Any]:
    """Return the typed options of a cluster that uses HTTP/2, with pings that detect a frozen upstream."""
    options = {
        # Our servers treat more than one ping per second as abuse and close the connection.
        "connection_keepalive": {"interval": "2s", "timeout": "5s"},
        "initial_stream_window_size": STREAM_WINDOW,
        "initial_connection_window_size": CONNECTION_WINDOW,
        "max_outbound_frames": MAX_FRAMES,
        "max_outbound_control_frames": MAX_FRAMES,
    }
    protocol = {"explicit_http_config": {"http2_protocol_options": options}}
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed(HttpProtocolOptions, protocol)}


def _health_check() -> dict[str, Any]:
    """Return an active gRPC health check of each instance, for clusters of services only.

    A node may have hundreds of models, each with a cluster of the same few instances. Model clusters rely on membership
    (an instance lists a model once the model is ready), outlier detection and retries.
    """
    return {
        "interval": "0.5s",
        "no_traffic_interval": "0.5s",
        # A dead process refuses connections immediately. The timeout tolerates a busy one, whose calls would be cut.
        "timeout": "2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "grpc_health_check": {},
    }


def _limits(priority: str) -> dict[str, Any]:
    """Return limits that are never reached: services bound their own queues and respond with RESOURCE_EXHAUSTED.

    The default of `max_retries` is 3 concurrent retries for the whole cluster. When an instance with 32 calls in flight
    was killed, 29 of the calls failed.
    """
    return {
        "priority": priority,
        "max_connections": 10_000,
        "max_pending_requests": 100_000,
        "max_requests": 100_000,
        "max_retries": 10_000,
    }


def _outlier_detection() -> OutlierDetection:
    """Return settings that eject an endpoint for a moment when connections to it fail.

    Statuses of calls do not count. Envoy maps INTERNAL and DEADLINE_EXCEEDED to 5xx, so five bad requests of one client
    would eject a good instance for all clients.
    """
    return OutlierDetection(
        # Built with the constructor, because `from_dict` cannot spell consecutive_5xx.
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=2,
        enforcing_consecutive_local_origin_failure=100,
        enforcing_consecutive_5xx=0,
        enforcing_consecutive_gateway_failure=0,
        enforcing_success_rate=0,
        enforcing_local_origin_success_rate=0,
        # A single endpoint is never ejected.
        max_ejection_percent=50,
        interval=timedelta(seconds=1),
        base_ejection_time=timedelta(seconds=1),
        max_ejection_time=timedelta(seconds=5),
    )
