"""Written bytes of one connection that its peer does not read: counted, and given up when it reads none for long."""

from __future__ import annotations

import asyncio
import logging

from mesh.h2.memory_account import MemoryAccount

log = logging.getLogger(__name__)

TICK_S, MAX_TICKS = 5.0, 6
"""Ticks without progress after which a peer is given up: after 30 to 35 s."""


class Unread:
    """Bytes that wait in the transport of one connection. `share` is the connection's share of the account."""

    is_closed_for_room = True
    """The connection is closed when the account is over its limit. False for an Envoy: it has few connections, which
    carry the calls of all its clients, and what they write at a time is bounded."""

    def __init__(self, account: MemoryAccount) -> None:
        self._account = account
        self.share = account.share()
        self._counted = self._bytes = self._ticks = 0

    def pause(self, transport: asyncio.WriteTransport) -> None:
        """Begin to count: the transport's buffer is full."""
        self._bytes, self._ticks = transport.get_write_buffer_size(), 0
        self.count(self._bytes, transport)

    def count(self, size: int, transport: asyncio.WriteTransport) -> None:
        """Count `size` bytes as waiting. Close the connection when the account is over its limit, unless it is kept."""
        added, self._counted = size - self._counted, size
        self.share.add(added)
        if added > 0 and self._account.held > self._account.limit and self.is_closed_for_room:
            log.warning(
                "a connection is closed: its peer does not read, and %(bytes)d bytes find no room",
                {"event": "connection.no_room_for_responses", "bytes": size},
            )
            transport.abort()

    def tick(self, transport: asyncio.WriteTransport) -> None:
        """Close the connection of a peer that has read nothing for MAX_TICKS. Called while something waits."""
        unread = transport.get_write_buffer_size()
        self.count(unread, transport)
        self._ticks = self._ticks + 1 if unread >= self._bytes else 0
        self._bytes = unread
        if self._ticks > MAX_TICKS:
            seconds = MAX_TICKS * TICK_S
            log.warning(
                "a connection is closed: its peer reads none of %(bytes)d bytes for %(seconds).0f s",
                {"event": "connection.does_not_read", "bytes": unread, "seconds": seconds},
            )
            transport.abort()
