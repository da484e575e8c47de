"""Headers in which a gateway passes a verified caller. It removes them from every request before it sets them.

`x-shoal-caller` holds the claims of the verified token: base64url of a JSON object, as the token has them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from shoal.errors import Unauthenticated

TRUSTED_PREFIX = "x-shoal-"
"""Prefix of all headers that services trust."""
CALLER_HEADER = "x-shoal-caller"
ROLE_HEADER = "x-shoal-role"
KEY_HEADER = "x-shoal-key"
ISSUER_HEADER = "x-shoal-issuer"
SUBJECT_HEADER = "x-shoal-subject"
"""Set only for a policy whose limits of requests depend on the subject."""
SIGNER_HEADER = "x-shoal-signer"
"""Header with the id (`kid`) of the public key that has verified the caller's token."""

JOB_CALLER_HEADER = "x-shoal-job-caller"
"""Header in which a service names the caller for whom it runs a job, as `x-shoal-caller` names one."""

JOB_RETRY_HEADER = "x-shoal-job-retry"
"""Header in which a service says that an earlier attempt of the job may have run."""

LAUNCHER = b"launcher"
"""Caller of the process that started the server. No gateway can send it: it is not the base64 of a JSON object."""
SERVICE = b"service"
"""Caller of a service of the mesh. The outbound listener of a node's Envoy sets it; a gateway cannot, as LAUNCHER."""
AS_SERVICE = ((CALLER_HEADER, SERVICE.decode()),)
"""Metadata of a call that a service makes for itself, and not through its node's Envoy."""

CONNECTOR = b"connector:"
"""Begins the caller of the jobs of a connector. No gateway can send it either."""


def value_of(claims: Mapping[str, Any]) -> bytes:
    """Return the value of CALLER_HEADER with `claims`."""
    return base64.urlsafe_b64encode(json.dumps(claims, separators=(",", ":")).encode()).rstrip(b"=")


def connector_value(name: str, tenant: str) -> bytes:
    """Return the caller of a connector's jobs."""
    return CONNECTOR + json.dumps([name, tenant]).encode()


def claims(value: bytes) -> Mapping[str, Any]:
    """Return the claims in a value of CALLER_HEADER. Raises Unauthenticated when it holds no claims."""
    try:
        found = json.loads(base64.urlsafe_b64decode(value + b"=" * (-len(value) % 4)), object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unauthenticated("the gateway passed no claims of a token")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a claim occurs twice")
    return found
