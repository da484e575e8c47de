"""Rule for addresses that other machines or users can reach: TLS and authentication, or an explicit option."""

from __future__ import annotations

from mesh.process.sockets import is_local
from shoal.errors import InvalidArgument


def check(
    option: str,
    listen: str,
    *,
    has_tls: bool,
    is_insecure: bool,
    has_policy: bool,
    policy_option: str = "--policy FILE (docs/policy.md)",
) -> None:
    """Check that a server may listen for clients at `listen`, `host:port`. `option` names the address's option.

    `has_policy` is True for a server that authenticates callers, which `policy_option` asks for.

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
    if has_tls:
        raise InvalidArgument(
            f"{problem}, and callers are not authenticated: authenticate them with {policy_option}; or add --insecure, "
            "where you trust everyone who can reach the address"
        )
    raise InvalidArgument(
        f"{problem} in plaintext, and callers are not authenticated: authenticate them with {policy_option}, and give "
        "a certificate with --tls-cert FILE --tls-key FILE or --tls auto; or add --insecure, where you trust everyone "
        "who can reach the address, and the network"
    )
