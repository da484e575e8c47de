"""TLS of a listener for clients. Fields: envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext.

The certificate arrives by SDS from a file on Envoy's machine: Envoy reloads a pair only there, without closing
connections. This module imports nothing of Envoy's classes, which take most of a second to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TYPES = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"

SECRET = "gateway"
"""Name of the secret in the SDS file."""

HANDSHAKE_TIMEOUT = "10s"
"""Longest time for a client's handshake. By default Envoy would wait for ever, and hold the connection."""


def transport_socket(sds: str, alpn: Sequence[str] = ("h2", "http/1.1")) -> dict[str, Any]:
    """Return the envoy.config.core.v3.TransportSocket of a filter chain, with the certificate of the file `sds`."""
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPES}.DownstreamTlsContext",
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "alpn_protocols": list(alpn),
                "tls_certificate_sds_secret_configs": [
                    {
                        "name": SECRET,
                        "sds_config": {"path_config_source": {"path": sds}, "resource_api_version": "V3"},
                    }
                ],
            },
        },
    }
