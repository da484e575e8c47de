"""Reservations of loopback ports: a port stays reserved from its choice until a process of the node listens on it.

A reservation is a socket that is bound and does not listen, with SO_REUSEADDR and SO_REUSEPORT. Linux lets a process
that sets the former, such as Envoy, listen on the same port, and never picks the port for a bind to port 0.
Two launchers could still reserve the same port. So a launcher also binds an abstract unix socket named after the port:
the name belongs to the port's network namespace, and disappears with the process.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from types import TracebackType

HOST = "127.0.0.1"
"""Host of addresses that only this machine can reach."""
_ATTEMPTS = 32
_LISTEN = "0A"


class PortInUse(Exception):
    """Another process listens on the port, or another node has reserved it."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"port {port} of {host} is in use")


class Ports:
    """Ports reserved for a node; leaving the block releases all of them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def reserve(self, port: int = 0, host: str = HOST) -> int:
        """Reserve `port`, or any free one for 0, and return its number.

        Raises:
            PortInUse: another process has it.
            OSError: this machine has no such address, or the port is for root only.
        """
        if port:
            return self._bind(host, port)
        for _ in range(_ATTEMPTS):
            try:
                return self._bind(host, 0)
            # Another node that starts now was given the same port.
            except PortInUse:
                continue
        raise PortInUse(host, 0)

    def _bind(self, host: str, port: int) -> int:
        with contextlib.ExitStack() as partial:
            sock = partial.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            name = partial.enter_context(socket.socket(socket.AF_UNIX))
            try:
                sock.bind((host, port))
                found: int = sock.getsockname()[1]
                name.bind(f"\0shoal-port-{found}")
            except OSError as err:
                if err.errno == errno.EADDRINUSE:
                    raise PortInUse(host, port) from err
                raise
            self._stack.push(partial.pop_all())
            return found

    def __enter__(self) -> Ports:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()


def numeric(host: str) -> str:
    """Return the numeric address of `host`: Envoy does not resolve names to listen at. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return str(socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0][4][0])


def joined(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def callable_here(host: str) -> str:
    """Return the address by which this machine calls a server that listens at `host`."""
    return {"0.0.0.0": HOST, "::": "::1"}.get(host, host)


def listeners(port: int) -> int:
    """Return the number of sockets of this machine that listen at the TCP port (proc(5), /proc/net/tcp)."""
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            rows = [line.split() for line in lines]
            found += sum(row[1].endswith(f":{port:04X}") and row[3] == _LISTEN for row in rows)
    return found
