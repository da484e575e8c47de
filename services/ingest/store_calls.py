"""Errors of calls to the store through the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mesh.rpc.interceptors import translated
from shoal.errors import Unavailable, Unimplemented


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Raise failures of calls in the block as ShoalError with their cause; `doing` begins the message.

    A mesh that has just started has no route to the store yet, and gRPC reports UNIMPLEMENTED: raised as Unavailable.
    """
    try:
        with translated(doing):
            yield
    except Unimplemented as err:
        raise Unavailable(f"{doing}: the mesh has no route to the store yet ({err.message})") from err
