"""Loopback ports that stay ours between the choice and the moment when a part listens there.

A reservation is a socket that is bound and does not listen, with SO_REUSEADDR and SO_REUSEPORT: Linux lets a part of
ours, which sets the first (etcd, mongod, Envoy), listen on the port beside it, and gives the port to nobody who asks
for any free one. That alone would let two launchers reserve the same port, so each also binds an abstract unix socket
named after it: it belongs to the same network namespace as the port, and goes with the process.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from types import TracebackType

HOST = "127.0.0.1"
_ATTEMPTS = 32
_LISTEN = "0A"


class PortInUse(Exception):
    """Another process listens on the port, or another node has reserved it."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"port {port} of {host} is in use")


class Ports:
    """The ports that a node has reserved; all of them are free again when the block ends."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def reserve(self, port: int = 0, host: str = HOST) -> int:
        """Reserves `port`, or any free one for 0, and returns it.

        Raises:
            PortInUse: it is taken.
            OSError: this machine has no such address, or the port is for root only.
        """
        if port:
            return self._hold(host, port)
        for _ in range(_ATTEMPTS):
            try:
                return self._hold(host, 0)
            except PortInUse:
                continue  # Another node that starts now was given the same one.
        raise PortInUse(host, 0)

    def reserve_preferred(self, port: int | None) -> int:
        """Reserves `port` where it is still free, else any free one."""
        try:
            return self.reserve(port or 0)
        except PortInUse:
            return self.reserve()

    def _hold(self, host: str, port: int) -> int:
        with contextlib.ExitStack() as undo:
            place = undo.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            name = undo.enter_context(socket.socket(socket.AF_UNIX))
            try:
                place.bind((host, port))
                found: int = place.getsockname()[1]
                name.bind(f"\0shoal-port-{found}")
            except OSError as err:
                if err.errno == errno.EADDRINUSE:
                    raise PortInUse(host, port) from err
                raise
            self._held.push(undo.pop_all())
            return found

    def __enter__(self) -> Ports:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._held.close()


def listeners(port: int) -> int:
    """How many sockets of this machine listen at the TCP port (proc(5), /proc/net/tcp)."""
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            rows = [line.split() for line in lines]
            found += sum(row[1].endswith(f":{port:04X}") and row[3] == _LISTEN for row in rows)
    return found
