"""The part of a policy that a gateway decides: issuer, role and RPC. Services decide the rest, by `decide`.

A gateway refuses early what no grant can allow to a role. It allows everything that `decide` may allow.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal.access.policy import ANY, BUILTIN_ROLES, Policy
from shoal.access.rpc_groups import GRANTABLE, GROUP_OF


def groups_of_role(policy: Policy, role: str) -> frozenset[str]:
    """Return the groups that some grant allows to some caller of `role`."""
    found: set[str] = set()
    for grant in policy.grants:
        if grant.deny is None and (ANY in grant.roles or role in grant.roles):
            found.update(policy.groups_of(role) if grant.allow is None else grant.allow)
    return frozenset(GRANTABLE) if ANY in found else frozenset(found)


def named_roles(policy: Policy) -> frozenset[str]:
    """Return the roles that differ from an unknown role."""
    named = {*policy.roles, *(role for grant in policy.grants for role in grant.roles if role != ANY)}
    if any(grant.allow is None and grant.deny is None for grant in policy.grants):
        named.update(BUILTIN_ROLES)
    return frozenset(named)


def rpcs_of(groups: Iterable[str], services: Iterable[str]) -> list[str]:
    """Return the RPCs of `groups` in `services` (`package.Service`)."""
    wanted, prefixes = frozenset(groups), tuple(f"/{service}/" for service in services)
    return [rpc for rpc, group in GROUP_OF.items() if group in wanted and rpc.startswith(prefixes) and "#" not in rpc]
