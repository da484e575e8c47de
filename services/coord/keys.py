"""Keys that the cluster signs: the signer is sealed in etcd, and a record of each key says whose it is.

    create ──> signer (sealed) ──> key, shown once      its record, until it expires
    revoke ──> revoked ids ──> every instance enforces it
    rotate ──> another signer; keys of the former one stay valid until they expire, or end now

The text of a key is nowhere in etcd.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from mesh.cluster.etcd import Created, Entry, Etcd, Modified, Put
from mesh.keyring import Keyring
from services.coord.enforcement import Enforcement
from shoal.access import cluster, tokens
from shoal.access.cluster import REVOKED, SIGNERS, SignerKey
from shoal.access.policy import REVOKED as MOST_REVOKED
from shoal.access.tokens import AUDIENCE, ISSUER, LIFE_S, Key, Signer
from shoal.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    ShoalError,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

# Outside of /shoal/, of which every coord keeps a copy.
_RECORDS = b"/shoal-keys/"
_SIGNER = b"/shoal-keyring/signer"
_PURPOSE = "signer"
# Signers whose keys are valid at once: each is an issuer of the policy in force.
_SIGNERS = 8
# Longest wait until all instances enforce a revocation. A process that was killed leaves the cluster after 3 s.
_ENFORCED_S = 10.0
# The expiry of a token of another issuer is not known: so long its id stays in the list.
_UNKNOWN_LIFE_S = 366 * 86_400
# Clocks may differ by so much: an id stays in the list beyond the expiry of its key.
_SKEW_S = 300
# A concurrent change of the same key of etcd.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Record:
    """A key that was made."""

    id: str
    tenant: str
    role: str
    subject: str
    models: tuple[str, ...]
    grants: tuple[str, ...]
    created_at: float
    expires_at: float
    issuer: str
    """The claim `iss`: it names the signer."""
    is_revoked: bool = False

    @property
    def signer(self) -> str:
        return self.issuer.rpartition(":")[2]

    @property
    def claims(self) -> Mapping[str, Any]:
        """Claims of the key, by which a policy decides."""
        return {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "jti": self.id,
            "sub": self.subject,
            "tenant": self.tenant,
            "role": self.role,
            "models": list(self.models),
            "grants": list(self.grants),
            "exp": self.expires_at,
        }


class Keys:
    """Makes, lists and revokes keys."""

    def __init__(
        self, etcd: Etcd, enforcement: Enforcement, keyring: Keyring, now: Callable[[], float] = time.time
    ) -> None:
        self._etcd = etcd
        self._enforcement = enforcement
        self.keyring = keyring
        self._now = now
        self.trouble = ""
        """Reason for which the first start has made no signer yet; empty when none is known."""

    async def begin(self, revoked: Mapping[str, float] = MappingProxyType({})) -> None:
        """Make the first signer of a new cluster. `revoked`: revoked keys that etcd may have lost.

        Raises:
            FailedPrecondition: the signer in etcd is sealed with another master key.
        """
        await self._revoke_again(revoked)
        if await self._etcd.get(_SIGNER) is None:
            signer = _new_signer()
            puts = [self._sealed(signer), Put(SIGNERS, cluster.signers_value([SignerKey(signer.public_jwk())]))]
            await self._etcd.transact([Created(_SIGNER, 0)], puts)
        await self._signer()

    async def _revoke_again(self, lost: Mapping[str, float]) -> None:
        for _ in range(_ATTEMPTS):
            entry = await self._etcd.get(REVOKED)
            before = cluster.revoked_of(entry.value) if entry is not None else {}
            after = {**lost, **before}
            now = self._now()
            after = {key: end for key, end in after.items() if key in before or end + _SKEW_S > now}
            if after == before:
                return
            when = _unchanged(REVOKED, entry)
            if (await self._etcd.transact([when], [Put(REVOKED, cluster.revoked_value(after))])).succeeded:
                log.warning(
                    "etcd had lost %(keys)d revoked keys: they are revoked again",
                    {"event": "keys.revoked_again", "keys": len(after) - len(before)},
                )
                return
        raise Aborted("other keys are being revoked: retry")

    async def while_valid(self, caller: Mapping[str, Any] | None) -> list[Created | Modified]:
        """Return the conditions under which the caller's key is valid, for the transaction that it asks for.

        The caller was admitted a moment ago. What it gets must not outlive the end of its key, as when a thief makes a
        key while an operator replaces the signer.

        Args:
            caller: its claims; None for the node's user.

        Raises:
            Unauthenticated: the key has ended meanwhile.
        """
        signers, revoked = await self._etcd.get(SIGNERS), await self._etcd.get(REVOKED)
        if caller is not None:
            issuer, known = str(caller["iss"]), cluster.signers_of(signers.value) if signers is not None else ()
            of_cluster = {cluster.issuer_name(ISSUER, one.kid) for one in known}
            if issuer == cluster.issuer_name(ISSUER, cluster.signer_in(issuer)) and issuer not in of_cluster:
                raise Unauthenticated("your key has ended meanwhile: another operator has replaced its signer")
            if revoked is not None and caller.get("jti") in cluster.revoked_of(revoked.value):
                raise Unauthenticated("your key was revoked meanwhile")
        return [_unchanged(SIGNERS, signers), _unchanged(REVOKED, revoked)]

    async def create(
        self,
        *,
        tenant: str,
        role: str,
        subject: str = "",
        models: tuple[str, ...] = (),
        grants: tuple[str, ...] = (),
        life_s: int = 0,
        caller: Mapping[str, Any] | None = None,
    ) -> tuple[Record, Key]:
        """Return a new key with its record.

        Args:
            caller: claims of the one who asks for it; None for the node's user.

        Raises:
            InvalidArgument: see shoal.access.tokens.create_key.
            FailedPrecondition: the signer is sealed with another master key.
            Unauthenticated: the caller's own key has ended meanwhile.
        """
        for _ in range(_ATTEMPTS):
            entry, signer = await self._signer()
            when = [Modified(_SIGNER, entry.mod_revision), *await self.while_valid(caller)]
            record, key = self._made(signer, tenant, role, subject, models or ("*",), grants, life_s or LIFE_S)
            async with self._lease(max(1, int(record.expires_at - self._now()))) as lease:
                if (await self._etcd.transact(when, [_put(record, lease)])).succeeded:
                    return record, key
                await self._etcd.revoke(lease)
        raise Aborted("other keys are being made and revoked: retry")

    @asynccontextmanager
    async def _lease(self, life_s: int) -> AsyncIterator[int]:
        """Yield a lease, with which the record of a key goes without a sweep. An error in the block revokes it."""
        lease = await self._etcd.grant(life_s)
        try:
            yield lease.id
        except BaseException:
            # It may have lost its etcd, too.
            with suppress(ShoalError):
                await lease.revoke()
            raise

    def _made(
        self,
        signer: Signer,
        tenant: str,
        role: str,
        subject: str,
        models: tuple[str, ...],
        grants: tuple[str, ...],
        life_s: int,
    ) -> tuple[Record, Key]:
        now = self._now()
        key = tokens.create_key(
            signer, tenant=tenant, role=role, subject=subject, models=models, grants=grants, life_s=life_s, now=now
        )
        return (
            Record(key.id, tenant, role, subject or key.id, models, grants, now, key.expires_at, signer.issuer),
            key,
        )

    async def records(self) -> list[Record]:
        """Return the keys that have not expired, the latest first."""
        listing = await self._etcd.list(_RECORDS)
        revoked, signers = await self._etcd.get(REVOKED), await self._etcd.get(SIGNERS)
        ids = cluster.revoked_of(revoked.value) if revoked is not None else {}
        known = {signer.kid for signer in cluster.signers_of(signers.value)} if signers is not None else set()
        now = self._now()
        records = [_record(entry, ids, known) for entry in listing.entries]
        return sorted((one for one in records if one.expires_at > now), key=lambda one: -one.created_at)

    async def valid_claims(self) -> list[Mapping[str, Any]]:
        """Return the claims of the keys that are valid now."""
        return [record.claims for record in await self.records() if not record.is_revoked]

    async def revoke(self, id: str) -> None:
        """Revoke a key, and wait until every instance enforces it.

        Raises:
            InvalidArgument: no key can have the id.
            ResourceExhausted: too many keys are revoked.
            Unavailable: an instance has not confirmed it; the revocation stays.
        """
        if not id.isascii() or not id.isprintable() or " " in id or not 0 < len(id) <= 255:
            raise InvalidArgument(f"id {id[:100]!r}: expected the id of a key, such as k-0123456789abcdef")
        record = await self._etcd.get(_RECORDS + id.encode())
        now = self._now()
        expires_at = json.loads(record.value)["expires_at"] if record is not None else now + _UNKNOWN_LIFE_S
        for _ in range(_ATTEMPTS):
            entry = await self._etcd.get(REVOKED)
            before = cluster.revoked_of(entry.value) if entry is not None else {}
            after = {key: expiry for key, expiry in before.items() if expiry + _SKEW_S > now} | {id: expires_at}
            if len(after) > MOST_REVOKED:
                raise ResourceExhausted(
                    f"{MOST_REVOKED} keys are revoked: `shoal keys rotate --stolen` ends all keys of the signer"
                )
            when = _unchanged(REVOKED, entry)
            done = await self._etcd.transact([when], [Put(REVOKED, cluster.revoked_value(after))])
            if done.succeeded:
                if late := await self._enforcement.lacking(done.revision, _ENFORCED_S):
                    raise Unavailable(
                        f"{id} is revoked, but not everywhere yet: {', '.join(late)} has not confirmed it"
                    )
                return
        raise Aborted("other keys are being revoked: retry")

    async def rotate(
        self, *, is_stolen: bool, caller: Mapping[str, Any] | None = None, renews_own: bool = False
    ) -> tuple[str, Key | None, tuple[str, ...]]:
        """Replace the signer.

        Return the id of the new one, the caller's new key, and the instances that have not confirmed it.

        Args:
            is_stolen: the keys of the former signers end now; otherwise they stay valid until they expire.
            caller: its claims; None for the node's user.
            renews_own: make a key with the caller's claims, which lives as long as its key did. A token of another
                issuer stays valid, and gets no key.

        Raises:
            FailedPrecondition: too many former signers have valid keys.
            Unauthenticated: the caller's own key has ended meanwhile.
        """
        # Not opened: a lost master key can be replaced, too.
        entry = await self._sealed_signer()
        public = await self._etcd.get(SIGNERS)
        if public is None:
            raise self._no_signer()
        signer, now = await asyncio.to_thread(_new_signer), self._now()
        known = cluster.signers_of(public.value)
        former = [] if is_stolen else _still_valid(known, await self.records(), now)
        if len(former) >= _SIGNERS:
            raise FailedPrecondition(
                f"{len(former)} former signers have valid keys: wait until these expire, or end them with --stolen"
            )
        signers = [*former, SignerKey(signer.public_jwk())]
        then = [self._sealed(signer), Put(SIGNERS, cluster.signers_value(signers))]
        when = [
            Modified(_SIGNER, entry.mod_revision),
            Modified(SIGNERS, public.mod_revision),
            *await self.while_valid(caller),
        ]
        key = None
        own = caller if renews_own else None
        if own is not None and own["iss"] in {cluster.issuer_name(ISSUER, one.kid) for one in known}:
            life_s = _life_s(own)
            record, key = self._made(
                signer,
                str(own["tenant"]),
                str(own["role"]),
                str(own.get("sub", "")),
                tuple(own.get("models", ("*",))),
                tuple(own.get("grants", ())),
                life_s,
            )
            async with self._lease(life_s) as lease:
                revision = await self._replace(when, [*then, _put(record, lease)])
        else:
            revision = await self._replace(when, then)
        return signer.kid, key, await self._enforcement.lacking(revision, _ENFORCED_S)

    async def _replace(self, when: Sequence[Created | Modified], then: list[Put]) -> int:
        done = await self._etcd.transact(when, then)
        if not done.succeeded:
            raise Aborted("another signer was made, or a key revoked, meanwhile: see `shoal keys list`, and retry")
        return done.revision

    def _no_signer(self) -> Unavailable:
        return Unavailable(f"the cluster has no signer yet: {self.trouble or 'retry in a moment'}")

    async def _sealed_signer(self) -> Entry:
        entry = await self._etcd.get(_SIGNER)
        if entry is None:
            raise self._no_signer()
        return entry

    async def _signer(self) -> tuple[Entry, Signer]:
        entry = await self._sealed_signer()
        text = self.keyring.open(_PURPOSE, entry.value).decode()
        return entry, await asyncio.to_thread(tokens.signer_of, text, "the signer in etcd")

    def _sealed(self, signer: Signer) -> Put:
        return Put(_SIGNER, self.keyring.seal(_PURPOSE, signer.as_text().encode()))


def _unchanged(key: bytes, entry: Entry | None) -> Created | Modified:
    return Created(key, 0) if entry is None else Modified(key, entry.mod_revision)


def _life_s(claims: Mapping[str, Any]) -> int:
    """Return the life of the key with `claims`: a short one must not become a long one."""
    issued, ends = claims.get("iat"), claims.get("exp")
    if not isinstance(issued, int | float) or not isinstance(ends, int | float):
        return LIFE_S
    return max(1, int(ends - issued))


def _new_signer() -> Signer:
    signer = tokens.new_signer()
    return Signer(cluster.issuer_name(ISSUER, signer.kid), signer.kid, signer.private_key)


def _still_valid(signers: tuple[SignerKey, ...], records: list[Record], now: float) -> list[SignerKey]:
    """Return the former signers that have valid keys, each with the expiry of its last key."""
    found = []
    for signer in signers:
        expiries = [record.expires_at for record in records if record.signer == signer.kid]
        if expiries and max(expiries) > now:
            found.append(SignerKey(signer.jwk, max(expiries)))
    return found


def _put(record: Record, lease: int) -> Put:
    return Put(_RECORDS + record.id.encode(), json.dumps(asdict(record)).encode(), lease)


def _record(entry: Entry, revoked: Mapping[str, float], signers: set[str]) -> Record:
    fields = json.loads(entry.value)
    fields |= {"models": tuple(fields["models"]), "grants": tuple(fields["grants"])}
    record = Record(**fields)
    is_revoked = record.id in revoked or record.signer not in signers
    return Record(**{**fields, "is_revoked": is_revoked})
