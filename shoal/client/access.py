"""`client.access`: the policy of a node's cluster, and the keys that the cluster signs."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from shoal.client.models.registry import of_time
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.coord.v1 import access_pb2 as pb

TIMEOUT_S = 30.0
"""Timeout of one call. A revocation waits up to 10 s for every instance."""


@dataclass(frozen=True)
class PolicyVersion:
    """A policy that was applied."""

    version: int
    applied_at: datetime | None
    applied_by: str
    forced: bool = False
    """True: it was applied against the refusal of the node."""
    rolled_back_to: int = 0
    """The version that was applied again; 0 for a new document."""
    unconfirmed: tuple[str, ...] = ()
    """Of the version that a call has applied: instances that have not confirmed in time that they enforce it."""


@dataclass(frozen=True)
class PolicyDocument:
    """A policy with its document."""

    policy: PolicyVersion
    document: str
    files: Mapping[str, str]
    """Files of keys that the document names, by name."""
    in_force: str = ""
    """The policy in force as JSON, with the public keys of issuers and the revoked keys; empty for earlier ones."""


@dataclass(frozen=True)
class KeyInfo:
    """A key that the cluster has signed, without its text."""

    id: str
    """Id by which the key is revoked."""
    tenant: str
    role: str
    subject: str
    models: tuple[str, ...]
    grants: tuple[str, ...]
    created_at: datetime | None
    expires_at: datetime | None
    signer: str
    revoked: bool
    """True: the key was revoked, or its signer has ended."""


@dataclass(frozen=True)
class NewKey:
    """A new key."""

    info: KeyInfo
    key: str = field(repr=False)
    """The key itself: a secret. It cannot be shown again."""


@dataclass(frozen=True)
class NewSigner:
    """A new signer of the cluster."""

    id: str
    key: str = field(default="", repr=False)
    """The caller's new key, where it asked for one: a secret."""
    unconfirmed: tuple[str, ...] = ()
    """Instances that have not confirmed in time that they enforce it."""


class AsyncAccess:
    """`client.access`: for the role admin, at a node that authenticates callers."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def policy(self, version: int = 0, *, timeout: float | None = TIMEOUT_S) -> PolicyDocument:
        """Return a policy that was applied; 0: the one in force."""
        found = await self._caller.call(methods.GET_POLICY, pb.GetPolicyRequest(version=version), timeout_s=timeout)
        return PolicyDocument(_version(found.policy), found.document, dict(found.files), found.in_force)

    async def history(self, *, timeout: float | None = TIMEOUT_S) -> builtins.list[PolicyVersion]:
        """Return the policies that were applied, the latest first."""
        found = await self._caller.call(methods.LIST_POLICIES, pb.ListPoliciesRequest(), timeout_s=timeout)
        return [_version(one) for one in found.policies]

    async def apply(
        self,
        document: str,
        files: Mapping[str, str] | None = None,
        *,
        expected_version: int = 0,
        force: bool = False,
        timeout: float | None = TIMEOUT_S,
    ) -> PolicyVersion:
        """Replace the policy.

        Args:
            document: YAML.
            files: content of the files that the document names in `jwks_file`, by name.
            expected_version: the version that must be in force; 0: any.
            force: apply also a document after which the caller, or everyone, may no longer administer.

        Raises:
            InvalidArgument: the document is not valid. FailedPrecondition: see `force`.
            Aborted: another version is in force.
        """
        request = pb.ApplyPolicyRequest(
            document=document, files=files or {}, expected_version=expected_version, force=force
        )
        made = await self._caller.call(methods.APPLY_POLICY, request, timeout_s=timeout)
        return replace(_version(made.policy), unconfirmed=tuple(made.unconfirmed))

    async def roll_back(self, version: int, *, force: bool = False, timeout: float | None = TIMEOUT_S) -> PolicyVersion:
        """Apply an earlier version again, as a new version. Raises as `apply`, and NotFound."""
        request = pb.RollBackPolicyRequest(version=version, force=force)
        made = await self._caller.call(methods.ROLL_BACK_POLICY, request, timeout_s=timeout)
        return replace(_version(made.policy), unconfirmed=tuple(made.unconfirmed))

    async def create_key(
        self,
        *,
        tenant: str,
        role: str,
        subject: str = "",
        models: Sequence[str] = (),
        grants: Sequence[str] = (),
        life_s: int = 0,
        timeout: float | None = TIMEOUT_S,
    ) -> NewKey:
        """Make a key. Without `models` it is for all models, and without `life_s` it lives 90 days."""
        request = pb.CreateKeyRequest(
            tenant=tenant, role=role, subject=subject, models=models, grants=grants, life_seconds=life_s
        )
        made = await self._caller.call(methods.CREATE_KEY, request, timeout_s=timeout)
        return NewKey(_key(made.info), made.key)

    async def keys(self, *, timeout: float | None = TIMEOUT_S) -> builtins.list[KeyInfo]:
        """Return the keys that have not expired, the latest first."""
        found = await self._caller.call(methods.LIST_KEYS, pb.ListKeysRequest(), timeout_s=timeout)
        return [_key(one) for one in found.keys]

    async def revoke_key(self, id: str, *, timeout: float | None = TIMEOUT_S) -> None:
        """Revoke a key. On return every instance refuses it, and has ended its streams.

        Raises:
            Unavailable: an instance has not confirmed it in time; the revocation stays.
        """
        await self._caller.call(methods.REVOKE_KEY, pb.RevokeKeyRequest(id=id), timeout_s=timeout)

    async def rotate_signer(
        self, *, stolen: bool = False, renew_own_key: bool = False, timeout: float | None = TIMEOUT_S
    ) -> NewSigner:
        """Replace the signer. Keys of the former one stay valid until they expire; with `stolen` they end now."""
        request = pb.RotateSignerRequest(stolen=stolen, renew_own_key=renew_own_key)
        made = await self._caller.call(methods.ROTATE_SIGNER, request, timeout_s=timeout)
        return NewSigner(made.signer, made.key, tuple(made.unconfirmed))


def _version(message: pb.PolicyVersion) -> PolicyVersion:
    return PolicyVersion(
        message.version, of_time(message, "applied_at"), message.applied_by, message.forced, message.rolled_back_to
    )


def _key(message: pb.KeyInfo) -> KeyInfo:
    return KeyInfo(
        id=message.id,
        tenant=message.tenant,
        role=message.role,
        subject=message.subject,
        models=tuple(message.models),
        grants=tuple(message.grants),
        created_at=of_time(message, "created_at"),
        expires_at=of_time(message, "expires_at"),
        signer=message.signer,
        revoked=message.revoked,
    )
