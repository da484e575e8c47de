"""Policies in etcd: the one that is applied, its predecessors, and the checks before another one is applied.

document ──valid?──> somebody, and its author, may administer under it? ──compare and swap──> etcd ──> in force
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mesh.cluster.etcd import Created, Delete, Entry, Etcd, Modified, Put
from mesh.cluster.mirror import Mirror
from mesh.rpc.cluster_access import values_of
from services.coord.enforcement import Enforcement
from shoal.access import cluster, limits
from shoal.access import policy as policies
from shoal.access.cluster import POLICY
from shoal.access.decision import caller_of, decide
from shoal.access.policy import Issuer, Policy
from shoal.access.rpc_groups import APPLY_POLICY
from shoal.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ShoalError,
    Unauthenticated,
    Unavailable,
)

log = logging.getLogger(__name__)

_HISTORY = b"/shoal-policies/"
"""Outside of /shoal/, of which every coord keeps a copy."""
KEPT = 20
"""Applied policies that are kept."""
DOCUMENT_BYTES = 256 << 10
"""Size of a document with its files of keys: etcd takes 1.5 MiB in one transaction, which has it twice."""
# Longest wait until all instances enforce an applied policy. It takes a tenth of a second.
_ENFORCED_S = 2.0

FIRST = """\
# The first policy of this cluster: every caller has the groups of its role, for every model (docs/policy.md).
# The nodes' own users may push models that run code, too.
version: 1
issuers:
  - {issuer: shoal, audiences: [shoal], token_prefix: shoal_, cluster: true}
grants:
  - {name: roles, models: ["*"]}
  - {name: code, tenants: [local], roles: [admin], allow: [code], models: ["*"]}
"""

_FIRST_START = "the first start"
_RESTORED = "coord, after etcd had lost it"

Claims = Mapping[str, Any]


@dataclass(frozen=True)
class Applied:
    """A policy that was applied."""

    version: int
    applied_at: float
    applied_by: str
    forced: bool = False
    rolled_back_to: int = 0
    document: str = ""
    files: Mapping[str, str] | None = None


class Policies:
    """Reads and replaces the policy of the cluster. `mirror` has all keys of the cluster."""

    def __init__(
        self, etcd: Etcd, mirror: Mirror, enforcement: Enforcement, now: Callable[[], float] = time.time
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._enforcement = enforcement
        self._now = now

    async def get(self, version: int = 0) -> Applied:
        """Return an applied policy; 0: the one in force. Raises NotFound."""
        if not version:
            entry = await self._etcd.get(POLICY)
            version = cluster.version_of({POLICY: entry.value}) if entry is not None else 0
        found = await self._etcd.get(_key(version))
        if found is None:
            raise NotFound(f"there is no version {version} of the policy: `shoal policy history` lists the last {KEPT}")
        return _decoded(found)

    def in_force(self) -> str:
        """Return the policy in force with its keys, as JSON; empty before the first one."""
        policy = cluster.in_force(values_of(self._mirror.copy)[0])
        return "" if policy is None else json.dumps(policy.model_dump(mode="json", exclude_defaults=True))

    async def history(self) -> list[Applied]:
        """Return the applied policies, the latest first."""
        listing = await self._etcd.list(_HISTORY)
        return [_decoded(entry) for entry in reversed(listing.entries)]

    async def begin(self, saved: Applied | None = None) -> None:
        """Apply the first policy of a new cluster, or again the last one of a cluster whose etcd has lost it.

        `saved`: a copy of the last one outside of etcd. It also replaces the policy that another coord has begun with
        since then, the first one or that of an older copy, as long as nobody has changed it.

        Raises:
            FailedPrecondition: the lost policy is not valid. None is applied: the first one would allow more.
            Aborted: another coord has applied one meanwhile: `saved` may be a later one, and is to be compared again.
        """
        entry = await self._etcd.get(POLICY)
        if entry is not None and (saved is None or not await self._is_replaced_by(saved, entry)):
            return
        history = [] if entry is not None else await self.history()
        known = [one for one in (saved, *history[:1]) if one is not None]
        when = Created(POLICY, 0) if entry is None else Modified(POLICY, entry.mod_revision)
        if not known:
            applied = Applied(1, self._now(), _FIRST_START, document=FIRST, files={})
            await self._write(applied, policies.parse(FIRST), when)
            return
        last = max(known, key=lambda one: one.version)
        try:
            policy = await asyncio.to_thread(_validated, last.document, last.files or {}, is_new=False)
        except InvalidArgument as err:
            raise FailedPrecondition(
                f"etcd has lost the policy, and version {last.version}, the last one, is not valid any more "
                f"({err.message}): mend its document in the data folder's copy"
            ) from err
        applied = Applied(last.version + 1, self._now(), _RESTORED, False, last.version, last.document, last.files)
        await self._write(applied, policy, when)
        log.warning(
            "etcd had lost the policy: version %(former_version)d is in force again, as %(version)d",
            {"event": "policy.restored", "former_version": last.version, "version": applied.version},
        )

    async def is_changed(self) -> bool:
        """Return True when etcd has a policy, and not the first one of a new cluster."""
        entry = await self._etcd.get(POLICY)
        return entry is not None and not _is_first(await self._entered(entry))

    async def _is_replaced_by(self, saved: Applied, entry: Entry) -> bool:
        """Return True when nobody has applied the policy in etcd, and `saved` is a later one: the one in etcd is the
        first one of a new cluster, or was restored from an older copy."""
        found = await self._entered(entry)
        if found is not None and found.applied_by == _RESTORED:
            return found.rolled_back_to < saved.version and saved.applied_at < found.applied_at
        return _is_first(found) and not _is_first(saved)

    async def _entered(self, entry: Entry) -> Applied | None:
        """Return the policy in etcd as it was applied; None when its history is lost."""
        try:
            return await self.get(cluster.version_of({POLICY: entry.value}))
        except NotFound:
            return None

    async def apply(
        self,
        document: str,
        files: Mapping[str, str],
        author: Claims | None,
        known: list[Claims],
        *,
        signer: str = "",
        expected: int = 0,
        force: bool = False,
        rolled_back_to: int = 0,
        while_valid: Sequence[Created | Modified] = (),
    ) -> tuple[Applied, tuple[str, ...]]:
        """Replace the policy. Return it, and the instances that have not confirmed that they enforce it.

        Args:
            author: claims of the caller; None: the node's user, whom no document locks out.
            known: claims of the keys that are valid now.
            signer: id of the public key that has verified the author's token.
            expected: version that must be in force; 0: any.
            force: leave out the checks that the author, and somebody, may administer under the document.
            while_valid: conditions under which the author's key is valid (`Keys.while_valid`).

        Raises:
            InvalidArgument: the document is not valid.
            FailedPrecondition: nobody, or not the author, may administer under the document.
            Aborted: another policy is in force, or was applied meanwhile, or a key has ended.
        """
        entry = await self._etcd.get(POLICY)
        # The node's user may replace a lost one.
        if entry is None and author is not None:
            raise Unavailable("the cluster has no policy yet: retry in a moment")
        if entry is None:
            version = max((one.version for one in await self.history()), default=0)
        else:
            version = cluster.version_of({POLICY: entry.value})
        if expected not in (0, version):
            raise Aborted(f"version {version} of the policy is in force, not {expected}: see what has changed")
        policy = await asyncio.to_thread(_validated, document, files)
        refusal = await asyncio.to_thread(self._refusal, policy, author, known, signer)
        if refusal and not force:
            raise FailedPrecondition(f"{refusal}. --force applies it all the same, and records who did")
        by = await asyncio.to_thread(self._name_of, author)
        applied = Applied(
            version + 1, self._now(), by, bool(refusal), rolled_back_to, document=document, files=dict(files)
        )
        when = Created(POLICY, 0) if entry is None else Modified(POLICY, entry.mod_revision)
        return applied, await self._write(applied, policy, when, *while_valid)

    async def _write(self, applied: Applied, policy: Policy, *when: Created | Modified) -> tuple[str, ...]:
        then: list[Put | Delete] = [
            Put(POLICY, cluster.policy_value(applied.version, policy)),
            Put(_key(applied.version), json.dumps(asdict(applied)).encode()),
        ]
        if applied.version > KEPT:
            then.append(Delete(_key(applied.version - KEPT)))
        done = await self._etcd.transact(when, then)
        if not done.succeeded:
            raise Aborted(
                "another policy was applied meanwhile, or a key ended: see `shoal policy history`, then apply again"
            )
        return await self._enforcement.lacking(done.revision, _ENFORCED_S)

    def _refusal(self, policy: Policy, author: Claims | None, known: list[Claims], signer: str) -> str:
        """Return the reason why `policy` must not be applied; empty when there is none."""
        values, _ = values_of(self._mirror.copy)
        candidate = cluster.in_force({**values, POLICY: cluster.policy_value(0, policy)})
        assert candidate is not None
        rule = ""
        if author is not None:
            rule = _denial(candidate, author) or _unverified(values, policy, candidate, author, signer)
        if author is not None and not rule:
            return ""
        if all(_denial(candidate, claims) for claims in known):
            return f"after this document no valid key may administer the cluster ({rule or 'no key has the right'})"
        if author is None:
            return ""
        return f"you could not have applied this document under itself ({rule})"

    def _name_of(self, claims: Claims | None) -> str:
        if claims is None:
            return "the node's user"
        values, _ = values_of(self._mirror.copy)
        try:
            policy = cluster.in_force(values)
            assert policy is not None
            caller = caller_of(policy, claims)
        except (ShoalError, AssertionError):
            return "a caller that is not known any more"
        return f"{caller.subject or '-'} of {caller.tenant}, key {caller.key or '-'}"


def _is_first(applied: Applied | None) -> bool:
    return applied is not None and applied.version == 1 and applied.applied_by == _FIRST_START


def _denial(policy: Policy, claims: Claims) -> str:
    """Return the rule by which a caller may not administer; empty when it may."""
    try:
        decision = decide(policy, caller_of(policy, claims), APPLY_POLICY)
    except Unauthenticated as err:
        return err.message
    return "" if decision.allowed else decision.rule


def _unverified(values: Mapping[bytes, bytes], document: Policy, candidate: Policy, claims: Claims, signer: str) -> str:
    """Return the reason why `candidate` would not verify the token of a caller, which another issuer has signed; empty
    when it would. `values`: those of the policy that has verified it, with the key `signer`."""
    name = claims.get("iss")
    applied, in_force = cluster.applied(values), cluster.in_force(values)
    if applied is None or in_force is None:
        return ""
    old, new = applied.issuer_of(name), document.issuer_of(name)
    before, after = in_force.issuer_of(name), candidate.issuer_of(name)
    # Keys of the cluster have an issuer for each signer, which no document changes.
    if old is None or new is None or before is None or after is None:
        return ""
    named = claims.get("aud")
    if not set(after.audiences) & set(named if isinstance(named, list) else [named]):
        return f"your token is for none of the audiences of the issuer {name}"
    if after.token_prefix != before.token_prefix:
        return f"your token does not have the prefix of the tokens of the issuer {name}"
    if new.is_fetched and (new.jwks_url, new.discovery) != (old.jwks_url, old.discovery):
        return f"the keys of the issuer {name} would come from another address, and may not verify your token"
    key = next((key for key in _keys(before) if key["kid"] == signer), None)
    if signer and key not in _keys(after):
        return f"the key {signer!r}, which verifies your token, is not among the keys of the issuer {name}"
    return ""


def _keys(issuer: Issuer) -> list[Mapping[str, Any]]:
    return list((issuer.jwks or {}).get("keys", ()))


def _validated(document: str, files: Mapping[str, str], *, is_new: bool = True) -> Policy:
    size = len(document.encode()) + sum(len(text.encode()) for text in files.values())
    if size > DOCUMENT_BYTES:
        raise InvalidArgument(f"the document and its files of keys have {size} bytes, of at most {DOCUMENT_BYTES}")

    def read(name: Path) -> str:
        if str(name) not in files:
            raise InvalidArgument(f"the file {name} of the document is missing in the call")
        return files[str(name)]

    policy = policies.resolved(policies.parse(document, is_new=is_new), read)
    limits.check(policy.limits)
    return policy


def _key(version: int) -> bytes:
    return _HISTORY + f"{version:012d}".encode()


def _decoded(entry: Entry) -> Applied:
    return Applied(**json.loads(entry.value))
