"""Bootstrap configuration of a node's Envoy: its identity, admin endpoint and coord cluster. The rest arrives over ADS.

Fields: envoy.config.bootstrap.v3.Bootstrap. The format is JSON, because in YAML a node called `n` would be a boolean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mesh.xds import ADS_CLUSTER
from shoal.access.caller_header import CALLER_HEADER, SERVICE
from shoal.node.envoy_overload import DEFAULT_HEAP_MB, memory
from shoal.node.envoy_runtime import runtime

NODE_CLUSTER = "shoal"
# Names of the listeners in mesh.xds.listeners. An import of that module takes most of a second.
_LISTENERS = ("gateway", "outbound")


def bootstrap(
    *,
    node: str,
    gateway: str,
    outbound: str,
    admin: str,
    coords: Sequence[str],
    heap: int = DEFAULT_HEAP_MB << 20,
    sds: str = "",
) -> str:
    """Return the bootstrap of `node`'s Envoy, as JSON.

    `gateway` is `host:port`. `admin` is the path of the admin interface's socket, and `outbound` that of the socket
    through which services call each other.
    `coords` are the socket paths of the node's coord replicas; each replica serves the whole configuration.
    `heap` is the ceiling of Envoy's heap in bytes. `sds` is the file of the gateway's certificate; empty: plaintext.
    """
    document = {
        "node": {
            "id": node,
            "cluster": NODE_CLUSTER,
            # coord generates the node's listeners from this metadata.
            "metadata": {"shoal": {"gateway": gateway, "outbound": outbound, **({"sds": sds} if sds else {})}},
        },
        "admin": {"address": {"pipe": {"path": admin, "mode": 0o600}}},
        "dynamic_resources": {"ads_config": _ads(), "cds_config": _from_ads(), "lds_config": _from_ads()},
        "static_resources": {"clusters": [_coord_cluster(coords)]},
        "layered_runtime": runtime(*_LISTENERS),
        **memory(heap),
    }
    return json.dumps(document, indent=2)


def _ads() -> dict[str, Any]:
    return {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        # Otherwise every request carries the whole node with Envoy's extensions, which coord parses in 13 ms.
        "set_node_on_first_message_only": True,
        "grpc_services": [
            {
                # coord serves the configuration to nobody else, where callers are authenticated.
                "initial_metadata": [{"key": CALLER_HEADER, "value": SERVICE.decode()}],
                "envoy_grpc": {
                    "cluster_name": ADS_CLUSTER,
                    # The default waits up to 30 s. Envoy retries a restarted coord, or another replica, within 0.5 s.
                    "retry_policy": {"retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"}},
                },
            }
        ],
    }


def _from_ads() -> dict[str, Any]:
    # 0 s: Envoy is not ready before coord has responded. With the default, Envoy would serve no routes after 15 s.
    return {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}


def _coord_cluster(coords: Sequence[str]) -> dict[str, Any]:
    return {
        "name": ADS_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {
                        # A coord that hangs keeps its connection. When a PING is not acknowledged in time, the
                        # stream moves to another replica.
                        "connection_keepalive": {"interval": "2s", "timeout": "2s"}
                    }
                },
            }
        },
        # A connect is enough to distinguish a served socket from one that a killed coord left behind.
        "health_checks": [
            {
                "timeout": "1s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "tcp_health_check": {},
            }
        ],
        "load_assignment": {
            "cluster_name": ADS_CLUSTER,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": path}}}} for path in coords]},
            ],
        },
    }
