"""Which front an infer process gets.

    h2      our own lean HTTP/2: fastest, for peers that are trusted: the Envoy beside it, programs of this machine
    envoy   inside an Envoy: for addresses that other machines can reach
    grpc    grpc.aio: runs everywhere, several times slower than either

Light on imports: the process that becomes Envoy should not load what Envoy's Python will load again.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

FRONT_VARIABLE, LISTEN_VARIABLE = "SHOAL_INFER_FRONT", "SHOAL_INFER_LISTEN"
CHOICES = ("auto", "h2", "envoy", "grpc")

_INSIDE = "services.infer.inside:app"
_LISTEN = re.compile(r"unix:/.+|.+:[0-9]+")


@dataclass(frozen=True)
class Choice:
    """A front, and why it is this one."""

    name: str
    """h2, envoy or grpc."""
    why: str


def choose(environ: Mapping[str, str]) -> Choice:
    """What SHOAL_INFER_FRONT asks for; with `auto` (the default) what suits SHOAL_INFER_LISTEN.

    With `envoy` it is Envoy, or the start fails with the reason. A value or an address that is none is left to the
    configuration, which explains it.
    """
    asked, listen = environ.get(FRONT_VARIABLE, "auto"), environ.get(LISTEN_VARIABLE, "")
    if asked not in CHOICES or not _LISTEN.fullmatch(listen):
        return Choice("grpc", "the configuration is wrong")
    if asked in ("h2", "grpc"):
        return Choice(asked, "it was asked for")
    if asked == "auto" and is_local(listen):
        return Choice("h2", "it is the fastest, and only this machine can reach the address")
    from mesh.embedded import launch

    reason = launch.obstacle()
    if reason is None:
        return Choice("envoy", "it was asked for" if asked == "envoy" else "other machines can reach the address")
    if asked == "envoy":
        print(f"shoal infer cannot start:\n{FRONT_VARIABLE}=envoy: {reason}", file=sys.stderr)
        sys.exit(2)
    return Choice("grpc", f"Envoy cannot host it here: {reason}")


def is_local(listen: str) -> bool:
    """Whether only this machine can reach the address."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def become_envoy(environ: Mapping[str, str]) -> NoReturn:
    """Replaces this process by an Envoy that hosts the service."""
    from mesh.embedded import launch

    launch.become_envoy(_INSIDE, environ[LISTEN_VARIABLE], environ=environ)
