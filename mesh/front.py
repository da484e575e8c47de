"""Local addresses: those that only this machine can reach."""

from __future__ import annotations

import ipaddress


def is_local(listen: str) -> bool:
    """Return whether only this machine can reach the address."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
