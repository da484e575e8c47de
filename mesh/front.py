"""Which front a service gets.

    h2      our own lean HTTP/2: fastest, for peers that are trusted: the Envoy beside it, programs of this machine
    envoy   inside an Envoy: for addresses that other machines can reach
    grpc    grpc.aio: runs everywhere, several times slower than either

Light on imports: the process that becomes Envoy should not load what Envoy's Python will load again.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from shoal.errors import FailedPrecondition

CHOICES = ("auto", "h2", "envoy", "grpc")


@dataclass(frozen=True)
class Choice:
    """A front, and why it is this one."""

    name: str
    """h2, envoy or grpc."""
    why: str


def choose(asked: str, listen: str) -> Choice:
    """The front that is asked for; with `auto` what suits the address `listen`.

    Raises:
        FailedPrecondition: it is to be `envoy`, which cannot run here; the message says why.
    """
    if asked in ("h2", "grpc"):
        return Choice(asked, "it was asked for")
    if asked == "auto" and is_local(listen):
        return Choice("h2", "it is the fastest, and only this machine can reach the address")
    from mesh.embedded import launch

    reason = launch.obstacle()
    if reason is None:
        return Choice("envoy", "it was asked for" if asked == "envoy" else "other machines can reach the address")
    if asked == "envoy":
        raise FailedPrecondition(f"the front inside Envoy cannot run here: {reason}")
    return Choice("grpc", f"the one inside Envoy, which is faster, cannot run here: {reason}")


def is_local(listen: str) -> bool:
    """Whether only this machine can reach the address."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
