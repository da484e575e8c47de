"""Calls to the store, through the mesh: what it means that one failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mesh.rpc.interceptors import translated
from shoal.errors import Unavailable, Unimplemented


@contextmanager
def asking_store(doing: str) -> Iterator[None]:
    """Raises calls' failures inside the block as ShoalError, the cause kept; `doing` opens the message.

    A mesh that has just started has no route to the store yet, which gRPC reads as UNIMPLEMENTED: that is Unavailable.
    """
    try:
        with translated(doing):
            yield
    except Unimplemented as err:
        raise Unavailable(f"{doing}: the mesh has no way to the store yet ({err.message})") from err
