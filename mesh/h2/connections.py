"""The connections of one server: their number is bounded, and idle ones make room for newcomers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

log = logging.getLogger(__name__)

# The Envoys of a node open a few dozen.
_MAX_CONNECTIONS = 1024


class Connection(Protocol):
    """Connection of one peer, of any version of HTTP."""

    @property
    def is_idle(self) -> bool:
        """True while no request is open."""

    @property
    def is_new(self) -> bool:
        """True before the first request."""

    def send_goaway(self) -> asyncio.Future[None]:
        """Ask the peer to send no more requests. The future is done when the peer knows, or has disconnected."""

    def send_last_goaway(self) -> None:
        """Close the connection when all open requests have ended."""

    def abort(self) -> None:
        """Close the connection immediately."""

    def held_by_tenant(self) -> Iterable[tuple[str, int]]:
        """Return the bytes that open requests hold here, by tenant; "" for those that name none."""


Connections = dict[Connection, None]
"""Open connections, the oldest first."""


def admit(connection: Connection, connections: Connections) -> bool:
    """Add a connection. Return False when there are too many, and none is idle."""
    if len(connections) >= _MAX_CONNECTIONS and not _displace_idle(connections):
        log.warning(
            "a connection is refused: %(open)d are open, and none is idle",
            {"event": "connection.refused", "open": len(connections)},
        )
        return False
    connections[connection] = None
    return True


def _displace_idle(connections: Connections) -> bool:
    """Close the oldest idle connection: of those without any request so far, if there are some."""
    idle = [connection for connection in connections if connection.is_idle]
    if not idle:
        return False
    displaced = next((connection for connection in idle if connection.is_new), idle[0])
    del connections[displaced]
    displaced.send_last_goaway()
    return True
