"""Rule for addresses that other machines or users can reach: TLS and authentication, or the operator's word."""

from __future__ import annotations

from mesh.process.sockets import is_local
from shoal.errors import InvalidArgument


def check(option: str, listen: str, *, has_tls: bool, is_insecure: bool) -> None:
    """Check that a server may listen for clients at `listen`, `host:port`. `option` names the address's option.

    Raises:
        InvalidArgument: others can reach the address, callers are not authenticated, and `is_insecure` is not set.
    """
    if is_local(listen) or is_insecure:
        return
    problem = f"{option} {listen}: other machines can reach this address"
    everyone = "callers are not authenticated yet, so everyone who can reach the address may call every method"
    if has_tls:
        raise InvalidArgument(f"{problem}, and {everyone}: add --insecure if you trust all of them")
    raise InvalidArgument(
        f"{problem} in plaintext, and {everyone}. There are three ways: --tls-cert FILE --tls-key FILE with your "
        "certificate, or --tls auto with one of Shoal's own CA, each with --insecure as long as callers are not "
        "authenticated; or --insecure alone, without encryption, where you trust the network, too"
    )
