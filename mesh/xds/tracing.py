"""Export of Envoy's spans to a collector, configured by the same standard OTEL_* variables as the services."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mesh.process.telemetry import collector, collector_headers, protocol, sampling_of
from mesh.xds.clusters import address, http2
from mesh.xds.messages import Cluster, OpenTelemetryConfig, UpstreamTlsContext
from mesh.xds.resource import CLUSTER, Resource, pack, typed

OTEL = "otel"
"""The collector's cluster."""
SERVICE = "shoal-envoy"
_DEFAULT_PORTS = {"grpc": 4317, "http/protobuf": 4318}


@dataclass(frozen=True)
class Tracing:
    """Collector and sampling of Envoy's spans."""

    url: str
    protocol: str = "grpc"
    """`grpc` or `http/protobuf`."""
    headers: tuple[tuple[str, str], ...] = ()
    sampled_percent: float = 100.0
    """Share of the calls without a trace context that are sampled."""


def tracing_of(environ: Mapping[str, str]) -> Tracing | None:
    """Return the tracing that the environment configures, or None for no tracing."""
    endpoint = collector(environ)
    if endpoint is None:
        return None
    headers = tuple(collector_headers(environ).items())
    return Tracing(endpoint, protocol(environ), headers, 100 * sampling_of(environ).ratio)


def _collector_address(tracing: Tracing) -> tuple[str, bool]:
    """Return the collector's address, `unix:/path` or `host:port`, and True when the collector uses TLS."""
    if tracing.url.startswith("unix:"):
        return "unix:" + tracing.url.removeprefix("unix:").replace("//", "", 1), False
    parts = urlsplit(tracing.url if "://" in tracing.url else f"http://{tracing.url}")
    return f"{parts.hostname}:{parts.port or _DEFAULT_PORTS[tracing.protocol]}", parts.scheme == "https"


def collector_cluster(tracing: Tracing) -> Resource:
    """Build the cluster of the collector. Envoy drops spans while the collector is unreachable; no call waits."""
    collector_address, tls = _collector_address(tracing)
    host = collector_address.rpartition(":")[0]
    document: dict[str, Any] = {
        "name": OTEL,
        "type": "STATIC" if collector_address.startswith("unix:") or _is_ip(host) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": OTEL,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(collector_address)}}]}],
        },
        # Envoy becomes ready even when the collector's host name cannot be resolved.
        "wait_for_warm_on_init": False,
    }
    if tracing.protocol == "grpc":
        document["typed_extension_protocol_options"] = http2()
    if tls:
        context = {
            "sni": host,
            "common_tls_context": {
                "validation_context": {
                    "trusted_ca": {"filename": "/etc/ssl/certs/ca-certificates.crt"},
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": host}}],
                }
            },
        }
        config = typed(UpstreamTlsContext, context)
        document["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": config}
    return pack(CLUSTER, OTEL, Cluster.from_dict(document))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def connection_manager_tracing(tracing: Tracing) -> dict[str, Any]:
    """Return HttpConnectionManager.Tracing: one span for the incoming call, and one for each upstream attempt."""
    config = typed(OpenTelemetryConfig, {"service_name": SERVICE})
    if tracing.protocol == "grpc":
        config["grpc_service"] = {
            "envoy_grpc": {"cluster_name": OTEL},
            "timeout": "1s",
            "initial_metadata": [{"key": key, "value": value} for key, value in tracing.headers],
        }
    else:
        config["http_service"] = {
            "http_uri": {"uri": tracing.url, "cluster": OTEL, "timeout": "1s"},
            "request_headers_to_add": [{"header": {"key": key, "value": value}} for key, value in tracing.headers],
        }
    return {
        "random_sampling": {"value": tracing.sampled_percent},
        "spawn_upstream_span": True,
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": config},
    }
