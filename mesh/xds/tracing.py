"""Spans of Envoy: where they go, by the standard OTEL_* variables that the services read too."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.trace.v3 import OpenTelemetryConfig
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import UpstreamTlsContext

from mesh.process.telemetry import collector, sampling_of
from mesh.xds.clusters import address, http2
from mesh.xds.resource import CLUSTER, Resource, pack, typed

OTEL = "otel"
"""The collector's cluster."""
SERVICE = "shoal-envoy"
_TRACES_PATH = "/v1/traces"
_DEFAULT_PORTS = {"grpc": 4317, "http/protobuf": 4318}


@dataclass(frozen=True)
class Tracing:
    """Where Envoy sends its spans."""

    url: str
    protocol: str = "grpc"
    """`grpc` or `http/protobuf`."""
    headers: tuple[tuple[str, str], ...] = ()
    sampled_percent: float = 100.0
    """Of the calls that come without a trace of their own."""


def tracing_of(environ: Mapping[str, str]) -> Tracing | None:
    """What the environment asks for. None: no tracing."""
    endpoint = collector(environ)
    if endpoint is None:
        return None

    def setting(name: str) -> str:
        return environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""

    protocol = "http/protobuf" if setting("PROTOCOL") == "http/protobuf" else "grpc"
    if protocol == "http/protobuf" and not environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        endpoint = endpoint.rstrip("/") + _TRACES_PATH
    pairs = (pair.partition("=") for pair in setting("HEADERS").split(",") if "=" in pair)
    headers = tuple((key.strip().lower(), unquote(value.strip())) for key, _, value in pairs)
    return Tracing(endpoint, protocol, headers, 100 * sampling_of(environ).ratio)


def _place(tracing: Tracing) -> tuple[str, bool]:
    """The collector's address, `unix:/path` or `host:port`, and whether it speaks TLS."""
    if tracing.url.startswith("unix:"):
        return "unix:" + tracing.url.removeprefix("unix:").replace("//", "", 1), False
    parts = urlsplit(tracing.url if "://" in tracing.url else f"http://{tracing.url}")
    return f"{parts.hostname}:{parts.port or _DEFAULT_PORTS[tracing.protocol]}", parts.scheme == "https"


def collector_cluster(tracing: Tracing) -> Resource:
    """The cluster of the collector. Nothing waits for it: spans are dropped while it is away."""
    place, tls = _place(tracing)
    host = place.rpartition(":")[0]
    document: dict[str, Any] = {
        "name": OTEL,
        "type": "STATIC" if place.startswith("unix:") or _is_ip(host) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": OTEL,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(place)}}]}],
        },
        # Envoy is ready whether or not the collector's name can be looked up.
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
    """HttpConnectionManager.Tracing: a span for the call as it came in, and one for each try upstream."""
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
