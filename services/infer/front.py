"""Which front this infer process gets (mesh.front), from its environment: before it reads all of its configuration."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from mesh import front
from mesh.exits import WRONG_SETTINGS
from mesh.front import Choice
from shoal.errors import FailedPrecondition

FRONT_VARIABLE, LISTEN_VARIABLE = "SHOAL_INFER_FRONT", "SHOAL_INFER_LISTEN"

_INSIDE = "services.infer.inside:app"
_SHARED = "SHOAL_INFER_SHARE_PORT"
_LISTEN = re.compile(r"unix:/.+|[^/\s]+:[0-9]{1,5}")
_TRUE = ("1", "true", "yes", "on")


def choose(environ: Mapping[str, str]) -> Choice:
    """What SHOAL_INFER_FRONT asks for, or what suits SHOAL_INFER_LISTEN. Exits 2 when that cannot run here.

    A value or an address that is none is left to the configuration, which explains it.
    """
    asked, listen = environ.get(FRONT_VARIABLE, "auto").strip(), environ.get(LISTEN_VARIABLE, "").strip()
    if asked not in front.CHOICES or not _LISTEN.fullmatch(listen):
        return Choice("grpc", "the configuration is wrong")
    try:
        return front.choose(asked, listen)
    except FailedPrecondition as err:
        print(f"shoal infer cannot start:\n{FRONT_VARIABLE}={asked}: {err.message}", file=sys.stderr)
        sys.exit(WRONG_SETTINGS)


def become_envoy(environ: Mapping[str, str]) -> NoReturn:
    """Replaces this process by an Envoy that hosts the service. Exits 1 when its address cannot be had."""
    from mesh.embedded import launch

    shared = environ.get(_SHARED, "").lower() in _TRUE
    try:
        launch.become_envoy(_INSIDE, environ[LISTEN_VARIABLE].strip(), environ=environ, share_port=shared)
    except OSError as err:
        print(f"shoal infer cannot start:\n{err}", file=sys.stderr)
        sys.exit(1)
