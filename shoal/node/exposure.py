"""Rule for addresses that other machines or users can reach: TLS and authentication, or an explicit option."""

from __future__ import annotations

from mesh.process.sockets import is_local
from shoal.errors import InvalidArgument


def check(option: str, listen: str, *, has_tls: bool, is_insecure: bool, has_policy: bool | None = None) -> None:
    """Check that a server may listen for clients at `listen`, `host:port`. `option` names the address's option.

    `has_policy` is True for a server that authenticates callers; None: this kind of server cannot yet.

    Raises:
        InvalidArgument: others can reach the address, it has not both TLS and a policy, and `is_insecure` is not set.
    """
    if is_local(listen) or is_insecure or (has_tls and has_policy):
        return
    problem = f"{option} {listen}: other machines can reach this address"
    if has_policy:
        raise InvalidArgument(
            f"{problem} in plaintext, and keys can be read on the way: add --tls-cert FILE --tls-key FILE with your "
            "certificate, or --tls auto with one of Shoal's own CA; or --insecure, where you trust the network"
        )
    if has_policy is False:
        raise InvalidArgument(
            f"{problem}{'' if has_tls else ' in plaintext'}, and callers are not authenticated: give a policy with "
            "--policy FILE (docs/policy.md) and a certificate with --tls-cert FILE --tls-key FILE or --tls auto; "
            "or add --insecure, where you trust everyone who can reach the address, and without TLS the network, too"
        )
    everyone = "callers are not authenticated yet, so everyone who can reach the address may call every method"
    if has_tls:
        raise InvalidArgument(f"{problem}, and {everyone}: add --insecure if you trust all of them")
    raise InvalidArgument(
        f"{problem} in plaintext, and {everyone}. There are three ways: --tls-cert FILE --tls-key FILE with your "
        "certificate, or --tls auto with one of Shoal's own CA, each with --insecure as long as callers are not "
        "authenticated; or --insecure alone, without encryption, where you trust the network, too"
    )
