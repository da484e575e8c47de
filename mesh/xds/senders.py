"""Number of a request's connection to Envoy, as a header: a service lets the connections of a tenant take turns."""

from __future__ import annotations

from typing import Any

from shoal.tenant_header import CONNECTION_HEADER

_MUTATION = "type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"


def connection_number() -> dict[str, Any]:
    """Return the extension that sets the header, for `early_header_mutation_extensions`; a client's own is replaced."""
    header = {"header": {"key": CONNECTION_HEADER, "value": "%CONNECTION_ID%"}}
    mutation = {"append": {**header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    return {"name": "connection", "typed_config": {"@type": _MUTATION, "mutations": [mutation]}}
