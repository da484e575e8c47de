"""Test for addresses of this machine."""

from __future__ import annotations

import ipaddress


def is_local(address: str) -> bool:
    """Return True when `address` (`host:port`, `[ipv6]:port` or `unix:path`) is on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
