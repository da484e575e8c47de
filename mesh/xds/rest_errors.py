"""Responses of Envoy itself to calls over REST, as JSON in the form of the inference protocol's errors.

Field: envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.local_reply_config
"""

from __future__ import annotations

from typing import Any

from shoal.access.rest_paths import PREFIX


def mapper() -> dict[str, Any]:
    """Return the mapper of local replies to paths of REST. The text of a reply to gRPC stays a text."""
    path = {"name": ":path", "string_match": {"prefix": PREFIX}}
    return {
        "filter": {"header_filter": {"header": path}},
        "body_format_override": {
            "json_format": {"error": "%LOCAL_REPLY_BODY%"},
            "content_type": "application/json",
        },
    }


def local_replies() -> dict[str, Any]:
    """Return the configuration of local replies that maps those to REST alone."""
    return {"mappers": [mapper()]}
