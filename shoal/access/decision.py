"""The decision about one call: a pure function of the policy, the caller, the RPC and the model.

    open RPC ──> revoked? ──> a deny that matches ──> the key's own models ──> a grant that allows ──> deny by default

A call that has a model run later, such as a submit of a job, is decided twice: for its RPC, then as an inference.
A gateway that does not know the model asks without one: the answer allows what some model may allow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shoal.access.patterns import matches_any
from shoal.access.policy import ANY, KEY_ID, TENANT_CHARS, Grant, Issuer, Policy, is_tenant
from shoal.access.rpc_groups import GROUP_OF, INFERS_LATER, INTERNAL, MODEL_INFER
from shoal.errors import Unauthenticated

MODEL_NAME = 255
"""Longest name of a model, in characters: that of a file. Callers may send names of any length."""


@dataclass(frozen=True)
class Caller:
    """A verified caller."""

    issuer: str
    tenant: str
    subject: str = ""
    role: str = ""
    key: str = ""
    """Id of the caller's key or token (`jti`)."""
    grants: frozenset[str] = frozenset()
    """Names of the grants that the key lists."""
    models: tuple[str, ...] = (ANY,)
    """Patterns of the models to which the key limits itself."""
    expires_at: float = float("inf")
    """Unix time, with the clock skew that its issuer allows."""


@dataclass(frozen=True)
class Decision:
    """Outcome for one call."""

    allowed: bool
    rule: str
    """The rule that decided, in words for the caller."""


@dataclass(frozen=True)
class Applicable:
    """The grants of a policy that apply to one caller, or to unverified callers. Immutable, for many decisions."""

    policy: Policy
    caller: Caller | None

    @cached_property
    def _grants(self) -> tuple[Grant, ...]:
        caller = self.caller
        return () if caller is None else tuple(grant for grant in self.policy.grants if _is_meant(grant, caller))

    @cached_property
    def _is_revoked(self) -> bool:
        return self.caller is not None and bool(self.caller.key) and self.caller.key in self.policy.revoked_ids

    def decide(self, rpc: str, model: str | None = None) -> Decision:
        """Return the decision about a call of `rpc`, as `decide` does."""
        decision = self._decide(rpc, model)
        if rpc not in INFERS_LATER or not decision.allowed:
            return decision
        inference = self._decide(MODEL_INFER, model)
        return Decision(True, f"{decision.rule}; {inference.rule}") if inference.allowed else inference

    def _decide(self, rpc: str, model: str | None) -> Decision:
        group, caller = GROUP_OF.get(rpc), self.caller
        if group is None:
            return Decision(False, f"no policy covers the RPC {rpc}")
        if group == INTERNAL:
            return Decision(False, "the RPC is for services only")
        if group in self.policy.open:
            return Decision(True, f"open: {group}")
        if caller is None:
            return Decision(False, "no verified caller")
        if self._is_revoked:
            return Decision(False, f"the key {caller.key} is revoked")
        # Before a pattern is matched: that takes time by the length of the name.
        if model is not None and len(model) > MODEL_NAME:
            return Decision(False, f"no model has a name of {len(model)} characters: names have at most {MODEL_NAME}")
        for grant in self._grants:
            if _has(grant.deny or (), group) and (ANY in grant.models if model is None else _covers(grant, model)):
                return Decision(False, f"grant {grant.name!r} denies {group}{_of(model)}")
        if model is not None and not matches_any(caller.models, model):
            return Decision(False, f"the key is not for the model {model!r}")
        for grant in self._grants:
            has_group = grant.deny is None and _has(self._allowed(grant, caller), group)
            if has_group and (model is None or _covers(grant, model)):
                return Decision(True, f"grant {grant.name!r} allows {group}{_of(model)}")
        return Decision(False, f"no grant allows {group}{_of(model)} to the role {caller.role!r} of {caller.tenant!r}")

    def _allowed(self, grant: Grant, caller: Caller) -> tuple[str, ...]:
        return self.policy.groups_of(caller.role) if grant.allow is None else grant.allow


def decide(policy: Policy, caller: Caller | None, rpc: str, model: str | None = None) -> Decision:
    """Return whether `caller` may call `rpc` for `model`, and the rule that says so.

    Args:
        caller: None without a verified caller.
        rpc: the path of the RPC, `/package.Service/Method`.
        model: None: no model is known. Allowed is then what some model may allow.
    """
    return Applicable(policy, caller).decide(rpc, model)


def _is_meant(grant: Grant, caller: Caller) -> bool:
    return (
        _has(grant.tenants, caller.tenant)
        and _has(grant.roles, caller.role)
        and _has(grant.subjects, caller.subject)
        and (not grant.by_name or grant.name in caller.grants)
    )


def _has(names: tuple[str, ...], name: str) -> bool:
    return name in names or ANY in names


def _covers(grant: Grant, model: str) -> bool:
    return matches_any(grant.models, model)


def _of(model: str | None) -> str:
    return "" if model is None else f" of the model {model!r}"


def caller_of(policy: Policy, claims: Mapping[str, Any]) -> Caller:
    """Return the caller that the verified claims of a token name.

    Raises:
        Unauthenticated: the issuer is not in the policy, a claim that its entry names is missing or no text, or the id
            of the key cannot be revoked.
    """
    issuer = policy.issuer_of(claims.get("iss"))
    if issuer is None:
        raise Unauthenticated("the policy has no such issuer of tokens")
    names = issuer.claim_names
    expires = claims.get("exp")
    return Caller(
        issuer=issuer.issuer,
        tenant=issuer.tenant or _tenant(claims, names.tenant, issuer),
        subject=_optional(claims, names.subject),
        role=issuer.role or _optional(claims, names.role),
        key=_key(claims, names.key, issuer),
        grants=frozenset(_list(claims, names.grants)),
        models=(ANY,) if names.models is None else tuple(_list(claims, names.models)),
        expires_at=expires + issuer.clock_skew_s if isinstance(expires, int | float) else float("inf"),
    )


def deciding_claims(policy: Policy, claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return the claims that the policy reads; the others may be personal, or long. The expiry is not among them."""
    issuer = policy.issuer_of(claims.get("iss"))
    names = vars(issuer.claim_names).values() if issuer is not None else ()
    deciding = {"iss", *(name.partition(".")[0] for name in names if name)}
    return {name: value for name, value in claims.items() if name in deciding}


def connector(name: str, tenant: str) -> Caller:
    """Return the caller of the jobs of a connector, which an operator has configured: a user of its tenant."""
    return Caller(issuer="", tenant=tenant, subject=f"connector:{name}", role="user")


def _claim(claims: Mapping[str, Any], path: str | None) -> Any:
    """Return a claim by its path; `a.b` is the claim b within the object a. None when there is none.

    Raises:
        Unauthenticated: the token has a claim whose own name is `a.b`. Envoy cannot read it.
    """
    found: Any = claims if path else None
    for name in (path or "").split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None and path and "." in path and path in claims:
        raise Unauthenticated(
            f"the token has a claim with a dot in its name, {path!r}, which cannot be read: the policy's `a.b` is the "
            "claim b within the object a"
        )
    return found


def _optional(claims: Mapping[str, Any], path: str | None) -> str:
    found = _claim(claims, path)
    return found if isinstance(found, str) else ""


def _tenant(claims: Mapping[str, Any], path: str | None, issuer: Issuer) -> str:
    found = _optional(claims, path)
    if not is_tenant(found):
        raise Unauthenticated(
            f"the token of {issuer.issuer} has no name of a tenant in its claim {path!r}: expected at most "
            f"{TENANT_CHARS} of letters, digits and . _ @ : / + -, a letter or digit first"
        )
    return found


def _key(claims: Mapping[str, Any], path: str | None, issuer: Issuer) -> str:
    found = _claim(claims, path)
    if found is None:
        return ""
    if not isinstance(found, str) or not re.fullmatch(KEY_ID, found):
        raise Unauthenticated(
            f"the token of {issuer.issuer} has an id in its claim {path!r} that cannot be revoked: expected a text of "
            "1 to 255 visible ASCII characters"
        )
    return found


def _list(claims: Mapping[str, Any], path: str | None) -> Iterator[str]:
    """Yield the names in a claim: a list of texts, or one text with names between spaces or commas."""
    found = _claim(claims, path)
    if isinstance(found, str):
        yield from found.replace(",", " ").split()
    elif isinstance(found, list):
        yield from (name for name in found if isinstance(name, str))
