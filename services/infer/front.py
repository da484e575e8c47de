"""Which front an infer process gets: inside Envoy (several times faster), or grpc.aio (runs everywhere).

Light on imports: the process that becomes Envoy should not load what Envoy's Python will load again.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

FRONT_VARIABLE, LISTEN_VARIABLE = "SHOAL_INFER_FRONT", "SHOAL_INFER_LISTEN"
CHOICES = ("auto", "envoy", "grpc")

_INSIDE = "services.infer.inside:app"
_LISTEN = re.compile(r"unix:/.+|.+:[0-9]+")


@dataclass(frozen=True)
class Choice:
    """A front, and why it is this one."""

    is_envoy: bool
    why: str

    @property
    def name(self) -> str:
        return "envoy" if self.is_envoy else "grpc"


def choose(environ: Mapping[str, str]) -> Choice:
    """What SHOAL_INFER_FRONT asks for: `auto` (the default) takes Envoy where it can run.

    With `envoy` it is Envoy, or the start fails with the reason. A value or an address that is none is left to the
    configuration, which explains it.
    """
    asked = environ.get(FRONT_VARIABLE, "grpc")
    if asked == "grpc":
        return Choice(False, f"{FRONT_VARIABLE}=grpc")
    if asked not in CHOICES or not _LISTEN.fullmatch(environ.get(LISTEN_VARIABLE, "")):
        return Choice(False, "the configuration is wrong")
    from mesh.embedded import launch

    reason = launch.obstacle()
    if reason is None:
        return Choice(True, "it is the faster one")
    if asked == "envoy":
        print(f"shoal infer cannot start:\n{FRONT_VARIABLE}=envoy: {reason}", file=sys.stderr)
        sys.exit(2)
    return Choice(False, f"Envoy cannot host it here: {reason}")


def become_envoy(environ: Mapping[str, str]) -> NoReturn:
    """Replaces this process by an Envoy that hosts the service."""
    from mesh.embedded import launch

    launch.become_envoy(_INSIDE, environ[LISTEN_VARIABLE], environ=environ)


def this_process() -> str:
    """The front of this very process."""
    return "envoy" if "SHOAL_EMBEDDED_ADMIN" in os.environ else "grpc"
