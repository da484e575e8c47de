"""The policy of a cluster in etcd: its keys there, and the policy in force that follows from them.

    policy    the document that an operator applied, validated, with its version
    signers   public keys of the signers of the cluster's own keys         } the policy in force
    revoked   ids of revoked keys, with their expiry
    jwks/...  the last keys that coord has fetched from an issuer

coord writes these keys. Every service follows them, and coord turns them into Envoy's configuration.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.access.policy import Issuer, Policy

PREFIX = b"/shoal/access/"
POLICY = PREFIX + b"policy"
SIGNERS = PREFIX + b"signers"
REVOKED = PREFIX + b"revoked"
_FETCHED = PREFIX + b"jwks/"
# Ids of signers as `shoal.access.tokens.new_signer` makes them.
_NAMED = re.compile(r".+:(k-[0-9a-f]{8})")


@dataclass(frozen=True)
class SignerKey:
    """Public key of a signer of the cluster."""

    jwk: Mapping[str, Any]
    ends_at: float | None = None
    """Unix time at which its last key expires; None: it signs new keys."""

    @property
    def kid(self) -> str:
        return str(self.jwk["kid"])


def issuer_name(issuer: str, kid: str) -> str:
    """Return the claim `iss` of the keys of one signer. Each has its own: the end of a signer ends its keys alone."""
    return f"{issuer}:{kid}"


def signer_in(issuer: str) -> str:
    """Return the signer's id in a name that `issuer_name` has made; empty for other names."""
    found = _NAMED.fullmatch(issuer)
    return found[1] if found else ""


def fetched_key(issuer: str) -> bytes:
    """Return the key of the last keys that were fetched from an issuer."""
    return _FETCHED + hashlib.sha256(issuer.encode()).hexdigest().encode()


def applied(values: Mapping[bytes, bytes]) -> Policy | None:
    """Return the applied policy; issuers whose keys are elsewhere have none. Raises as `in_force`."""
    return Policy.model_validate(json.loads(values[POLICY])["policy"]) if POLICY in values else None


def policy_value(version: int, policy: Policy) -> bytes:
    """Return the value of POLICY. `policy` has the keys of its issuers, not names of files."""
    return json.dumps({"version": version, "policy": policy.model_dump(mode="json", exclude_defaults=True)}).encode()


def signers_value(signers: Iterable[SignerKey]) -> bytes:
    """Return the value of SIGNERS."""
    return json.dumps([{"jwk": dict(signer.jwk), "ends_at": signer.ends_at} for signer in signers]).encode()


def signers_of(value: bytes) -> tuple[SignerKey, ...]:
    """Return the signers in a value of SIGNERS. Raises ValueError, KeyError or TypeError for another value."""
    return tuple(SignerKey(entry["jwk"], entry["ends_at"]) for entry in json.loads(value))


def revoked_value(revoked: Mapping[str, float]) -> bytes:
    """Return the value of REVOKED: expiry by the id of a key."""
    return json.dumps(dict(revoked)).encode()


def revoked_of(value: bytes) -> dict[str, float]:
    """Return the revoked keys in a value of REVOKED."""
    return {str(key): float(expiry) for key, expiry in json.loads(value).items()}


def version_of(values: Mapping[bytes, bytes]) -> int:
    """Return the version of the applied policy; 0 before the first one."""
    return int(json.loads(values[POLICY])["version"]) if POLICY in values else 0


def in_force(values: Mapping[bytes, bytes]) -> Policy | None:
    """Return the policy in force, by the values of the keys under PREFIX; None before the first policy.

    Raises:
        ValueError, KeyError, TypeError: a value has another form, as a newer version may write it.
    """
    policy = applied(values)
    if policy is None:
        return None
    signers = signers_of(values[SIGNERS]) if SIGNERS in values else ()
    revoked = revoked_of(values[REVOKED]) if REVOKED in values else {}
    issuers = [known for issuer in policy.issuers for known in _with_keys(issuer, signers, values)]
    return policy.model_copy(
        update={"issuers": tuple(issuers), "revoked": tuple(dict.fromkeys((*policy.revoked, *revoked)))}
    )


def with_known_keys(policy: Policy, in_force: Policy) -> Policy:
    """Return a document's policy with the keys of the cluster, and of issuers elsewhere, of the policy in force.

    The keys that are revoked there are, too.
    """
    issuers: list[Issuer] = []
    for issuer in policy.issuers:
        if not (issuer.cluster or issuer.is_fetched):
            issuers.append(issuer)
            continue
        for known in in_force.issuers:
            signer = signer_in(known.issuer)
            if known.issuer == (issuer_name(issuer.issuer, signer) if issuer.cluster else issuer.issuer):
                keys = {"jwks": known.jwks, "jwks_url": None, "discovery": False, "cluster": False}
                issuers.append(issuer.model_copy(update={"issuer": known.issuer, **keys}))
    revoked = tuple(dict.fromkeys((*policy.revoked, *in_force.revoked)))
    return policy.model_copy(update={"issuers": tuple(issuers), "revoked": revoked})


def _with_keys(issuer: Issuer, signers: Iterable[SignerKey], values: Mapping[bytes, bytes]) -> list[Issuer]:
    """Return the issuers that an entry of the document names, each with its public keys; none before they are known."""
    if issuer.is_fetched:
        fetched = values.get(fetched_key(issuer.issuer))
        known = {"jwks": json.loads(fetched), "jwks_url": None, "discovery": False} if fetched is not None else None
        return [] if known is None else [issuer.model_copy(update=known)]
    if not issuer.cluster:
        return [issuer]
    return [
        issuer.model_copy(
            update={
                "issuer": issuer_name(issuer.issuer, signer.kid),
                "jwks": {"keys": [dict(signer.jwk)]},
                "cluster": False,
            }
        )
        for signer in signers
    ]
