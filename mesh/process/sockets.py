"""Addresses that a server listens at: `unix:/path` and TCP's `host:port`."""

from __future__ import annotations

import ipaddress
from pathlib import Path


def path_of(listen: str) -> Path | None:
    """Return the file of a unix socket; None for a TCP address."""
    return Path(listen.removeprefix("unix:")) if listen.startswith("unix:") else None


def prepare(listen: str) -> None:
    """Create the folder of a unix socket, and remove a stale socket file. Does nothing for a TCP address.

    The launcher ensures that no other process listens there.
    """
    if (path := path_of(listen)) is not None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)


def remove(listen: str) -> None:
    """Remove the file of a unix socket that is closed. Does nothing for a TCP address."""
    if (path := path_of(listen)) is not None:
        path.unlink(missing_ok=True)


PRIVATE_MODE = 0o600
"""Mode of a unix socket that only its user can reach."""


def is_local(listen: str, mode: int = PRIVATE_MODE) -> bool:
    """Return True when only this machine can reach the address; a unix socket of `mode`, when only its user can."""
    if listen.startswith("unix:"):
        return not mode & ~PRIVATE_MODE
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
