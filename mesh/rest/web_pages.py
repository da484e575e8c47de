"""Requests that a web page made in the browser of a user of this machine: servers without a policy refuse them.

A page of any origin may send a POST to loopback without asking first, and a page whose name was made to resolve to
loopback (DNS rebinding) may read responses. Browsers name the page's origin in each POST, and its host in each request.
"""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache

from mesh.h2.headers import Block

_LOCALHOST = "localhost"
# No name is longer (RFC 1035, section 2.3.4), with a port.
_MAX_AUTHORITY = 255 + len(":65535")
# Decisions that are kept: 100 KiB.
_KEPT = 256


def refusal(head: Block, peer: str) -> tuple[int, str] | None:
    """Return the status and text for a request that a web page may have made; None for others.

    Args:
        peer: IP address of the client, or "unix".
    """
    # An Envoy in front has its own list of names and origins (mesh.xds.web).
    if peer == "unix":
        return None
    if b"origin" in head.by_name:
        return 403, "requests of web pages are not accepted here: a policy with keys is needed (docs/policy.md)"
    authority = head.by_name.get(b":authority") or head.by_name.get(b"host") or b""
    if _is_loopback(peer) and not is_own_name(authority.decode("latin-1")):
        return 421, "this server has another name: call it by its IP address, or as localhost"
    return None


def is_own_name(authority: str) -> bool:
    """Return True for an IP address, and for names that no domain of others can have."""
    return len(authority) <= _MAX_AUTHORITY and _is_own(authority)


@lru_cache(maxsize=_KEPT)
def _is_own(authority: str) -> bool:
    host = authority.rpartition(":")[0] if authority.rpartition(":")[2].isdecimal() else authority
    host = host.strip("[]").lower().rstrip(".")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(f".{_LOCALHOST}") or host == socket.gethostname().lower()
    return True


def _is_loopback(peer: str) -> bool:
    return peer.startswith("127.") or peer in ("::1", "::ffff:127.0.0.1")
