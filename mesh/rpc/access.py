"""Access to a server behind a gateway: decisions about calls, by the caller that the gateway has verified.

    gateway ──x-shoal-caller──> Access ──decide(policy, caller, rpc, model)──> handler
                                  └── a changed policy, an expired token ──> open calls end

The policy is a snapshot. A new one replaces it with all cached decisions. The server must listen where only its gateway
can connect: whoever connects may name any caller. Services of the mesh may call everything.

A servicer of a server with access asks `access.check(rpc, caller_in(context), model)`. The result is the Caller with
its tenant, or None for a service of the mesh, whose x-shoal-tenant header counts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mesh.process.tasks import Background
from mesh.rpc.held_shares import CallLimits, HeldShares
from shoal.access import caller_header
from shoal.access.caller_header import CALLER_HEADER, CONNECTOR, LAUNCHER, SERVICE, SIGNER_HEADER
from shoal.access.cluster import signer_in
from shoal.access.decision import MODEL_NAME, Applicable, Caller, Decision, caller_of, connector, deciding_claims
from shoal.access.limits import applicable
from shoal.access.policy import Policy
from shoal.access.rpc_groups import ACCESS_SERVICE, MODEL_INFER, OF_LAUNCHER, is_health_check
from shoal.errors import PermissionDenied, ShoalError, Unauthenticated, Unavailable
from shoal.tenant_header import TENANT_HEADER

log = logging.getLogger(__name__)

# Callers whose decisions are cached: as many as the gateway caches tokens. Beyond it, the cache is cleared.
_CALLERS = 8192
# Cached decisions of one caller, who chooses the names of models, and of all: one with many tokens is many callers. One
# takes 1 kB at the most. Beyond the second number, the cache is cleared.
_DECISIONS, _TOGETHER = 1024, 100_000
# Callers whose addresses are remembered, and addresses of one. Beyond it, all callers are new again, and all further
# addresses are one.
_SIGNED_IN, _ADDRESSES = 8192, 32
_FURTHER = b"*"
# Pause between two checks for expired tokens of open calls.
_EXPIRY_CHECK_S = 2.0

CALLER, _TENANT = CALLER_HEADER.encode(), TENANT_HEADER.encode()
ADDRESS = b"x-envoy-external-address"
"""Header with the caller's address, which Envoy sets whatever the caller sends."""
_SIGNER = SIGNER_HEADER.encode()
# Values of the header without claims.
_UNNAMED = (None, LAUNCHER, SERVICE)
_ALLOWED = Decision(True, "a check of the server's health, its launcher, or a service of the mesh")


def caller_in(context: Any) -> bytes | None:
    """Return the caller of a call on the slow path, as its gateway passes it; None without one."""
    for key, value in context.invocation_metadata() or ():
        if key == CALLER_HEADER:
            return value.encode("latin-1", "replace") if isinstance(value, str) else None
    return None


def tenant_of(access: Access | None, headers: Mapping[bytes, bytes]) -> str:
    """Return the tenant of a call: the verified caller's; of a service, or without access, the one that it names."""
    caller = headers.get(CALLER)
    if access is not None and caller not in _UNNAMED:
        try:
            known = access.identify(caller)
        except ShoalError:
            return ""
        return "" if known is None else known.tenant
    return headers.get(_TENANT, b"").decode("latin-1")


class _Known:
    """A caller and the decisions about its calls."""

    __slots__ = (
        "_decisions",
        "_on_kept",
        "addresses",
        "applicable",
        "caller",
        "inferable",
        "job_limits",
        "limits",
        "storable",
    )

    def __init__(self, applicable: Applicable, addresses: set[bytes], on_kept: Callable[[], None]) -> None:
        """`on_kept` is called for each decision that is kept."""
        self._on_kept = on_kept
        self.applicable = applicable
        self.caller = applicable.caller
        self.addresses = addresses
        """Addresses from which the caller has come; empty: of a call without one."""
        self.inferable: set[str] = set()
        """Models of which the caller may call ModelInfer."""
        self.storable = b""
        """Value for `Access.storable`; empty until it is asked for."""
        self.limits: dict[str, CallLimits | None] = {}
        """Shares in which the caller's calls count, by model."""
        self.job_limits: dict[str, CallLimits | None] = {}
        """Shares in which the caller's jobs count when infer runs them, by model."""
        self._decisions: dict[tuple[str, str | None], Decision] = {}

    def decide(self, rpc: str, model: str | None) -> Decision:
        # A caller could fill the memory with the longest names that fit into a message.
        if model is not None and len(model) > MODEL_NAME:
            return self.applicable.decide(rpc, model)
        found = self._decisions.get((rpc, model))
        if found is None:
            if len(self._decisions) >= _DECISIONS:
                self._decisions.clear()
                self.inferable.clear()
            found = self._decisions[rpc, model] = self.applicable.decide(rpc, model)
            self._on_kept()
            if found.allowed and rpc == MODEL_INFER and model is not None:
                self.inferable.add(model)
        return found


class Access(Background):
    """Decides about the calls of one server. Use as `async with`, for the end of calls whose token expires.

    `now` is the Unix time. A caller is given as the value of the header x-shoal-caller; None without one.
    Without a policy, as long as it is not known, callers get UNAVAILABLE.
    """

    def __init__(
        self, policy: Policy | None, now: Callable[[], float] = time.time, shares: HeldShares | None = None
    ) -> None:
        """Decide by `policy`. `shares` counts calls by its limits; None: this server counts none."""
        self._policy = policy
        self._now = now
        self.shares = shares
        self.is_limited = False
        """True when the policy has limits that this server counts."""
        self._shares_epoch = 0
        self._followers: list[Callable[[Policy], None]] = []
        self.on_sign_in: Callable[[str, Caller, bytes], None] | None = None
        """Called at the first call that a caller may make from an address: with the RPC, the caller, and the address;
        empty for addresses beyond those that are told apart."""
        # By what tells callers apart. They stay when the policy changes.
        self._addresses: dict[tuple[str, str, str, str], set[bytes]] = {}
        if policy is not None:
            self._set_limits(policy)
        self._callers: dict[bytes | None, _Known] = {}
        # Decisions that were kept since the cache was cleared.
        self._kept = 0
        self._open: dict[object, tuple[str, bytes | None, Callable[[ShoalError], None], bytes | None]] = {}

    def set_policy(self, policy: Policy) -> None:
        """Replace the policy. Open calls that it does not allow end with PERMISSION_DENIED."""
        self._policy = policy
        self._callers.clear()
        self._set_limits(policy)
        for follow in self._followers:
            follow(policy)
        self._end_open_calls()

    def follow_policy(self, follow: Callable[[Policy], None]) -> None:
        """Call `follow` with the policy in force, once there is one, and with each that replaces it."""
        self._followers.append(follow)
        if self._policy is not None:
            follow(self._policy)

    def _set_limits(self, policy: Policy) -> None:
        if self.shares is not None:
            self.shares.set_policy(policy)
            self.is_limited = self.shares.has_limits

    def check(self, rpc: str, caller: bytes | None, model: str | None = None) -> Caller | None:
        """Return the caller when it may call `rpc` for `model`; None for a service, and for a call without a caller.

        Args:
            model: None: the RPC names no model, or its message is not read yet.

        Raises:
            Unauthenticated: there is no verified caller. PermissionDenied: the caller may not; the message says why.
        """
        decision = self._decide(rpc, caller, model)
        if not decision.allowed:
            raise (Unauthenticated if caller is None else PermissionDenied)(f"not allowed: {decision.rule}")
        return None if caller in _UNNAMED else self._known(caller).caller

    def audited_reader(self, caller: bytes | None) -> Caller | None:
        """Return the caller when the policy has its reads of content audited; else None.

        The call was admitted, so its caller is valid; unless the policy has changed meanwhile.
        """
        if self._policy is None or not self._policy.audit.reads or caller in _UNNAMED:
            return None
        known = self._known(caller).caller
        return known if known is not None and self._policy.audit.is_of(known.tenant) else None

    def identify(self, caller: bytes) -> Caller | None:
        """Return the caller, whatever it may call; None for a service. Raises Unauthenticated for an invalid one."""
        return None if caller in _UNNAMED else self._known(caller).caller

    def check_call(self, rpc: str, headers: Mapping[bytes, bytes], model: str | None = None) -> Caller | None:
        """Return and raise as `check` does, for the caller and the address in the headers of a call."""
        caller = headers.get(CALLER)
        found = self.check(rpc, caller, model)
        if found is not None:
            address, addresses = headers.get(ADDRESS, b""), self._known(caller).addresses
            if address not in addresses:
                self._sign_in(rpc, found, address, addresses)
        return found

    def check_infer(self, headers: Mapping[bytes, bytes], model: str) -> Caller | None:
        """Return and raise as `check_call` does for ModelInfer. Two lookups for a decision that is cached."""
        known = self._callers.get(headers.get(CALLER))
        if known is not None and model in known.inferable and headers.get(ADDRESS, b"") in known.addresses:
            return known.caller
        return self.check_call(MODEL_INFER, headers, model)

    def limits_of(self, caller: bytes | None, model: str, job_caller: bytes | None = None) -> CallLimits | None:
        """Return the shares in which a call for `model` counts that was checked; None when it counts in none.

        Args:
            job_caller: the caller for whom a service runs the model. A service's other calls do not count.
        """
        shares = self.shares
        if shares is None or not self.is_limited:
            return None
        if shares.epoch != self._shares_epoch:
            self._shares_epoch = shares.epoch
            for known in self._callers.values():
                known.limits.clear()
                known.job_limits.clear()
        is_job = caller in _UNNAMED
        if is_job and (caller := job_caller) is None:
            return None
        known = self._known(caller)
        by_model = known.job_limits if is_job else known.limits
        if model in by_model:
            return by_model[model]
        if known.caller is None:
            return None
        if len(by_model) >= _DECISIONS:
            by_model.clear()
        limits = applicable(known.applicable.policy, known.caller)
        found = by_model[model] = shares.limits_of(limits, known.caller, model, is_job=is_job)
        return found

    def allows(self, rpc: str, caller: bytes | None, model: str) -> bool:
        """Return True when the caller may call `rpc` for `model`. Raises Unauthenticated for an invalid caller."""
        return self._decide(rpc, caller, model).allowed

    def storable(self, caller: bytes) -> bytes:
        """Return a shorter value for the same decisions about a caller, to be stored with work that runs later."""
        if caller.startswith(CONNECTOR):
            return caller
        known = self._known(caller)
        if not known.storable:
            claims = deciding_claims(known.applicable.policy, caller_header.claims(caller))
            known.storable = caller_header.value_of(claims)
        return known.storable

    @contextmanager
    def open_call(self, rpc: str, headers: Mapping[bytes, bytes], end: Callable[[ShoalError], None]) -> Iterator[None]:
        """Admit a call for as long as the block lasts. Raises as `check_call` does.

        `end` is called at most once, when the call is not allowed any more. A gateway may know a signer's new key a
        moment earlier: the signer that the headers name is checked only while the call is open.
        """
        self.check_call(rpc, headers)
        # Its caller may take its own rights away: the call, a short one, ends with its own result.
        if rpc.startswith(ACCESS_SERVICE):
            yield
            return
        call = object()
        self._open[call] = (rpc, headers.get(CALLER), end, headers.get(_SIGNER))
        try:
            yield
        finally:
            self._open.pop(call, None)

    def _sign_in(self, rpc: str, caller: Caller, address: bytes, addresses: set[bytes]) -> None:
        if len(addresses) > _ADDRESSES:
            if _FURTHER in addresses:
                return
            addresses.add(_FURTHER)
            address = b""
        else:
            addresses.add(address)
        if self.on_sign_in is not None:
            self.on_sign_in(rpc, caller, address)

    def _addresses_of(self, caller: Caller | None) -> set[bytes]:
        if caller is None:
            return {b""}
        name = (caller.issuer, caller.tenant, caller.subject, caller.key)
        found = self._addresses.get(name)
        if found is None:
            if len(self._addresses) >= _SIGNED_IN:
                self._addresses.clear()
            found = self._addresses[name] = {b""}
        return found

    def _check_signer(self, caller: Caller | None, signer: bytes | None) -> None:
        """Raise Unauthenticated when the policy has the keys of the caller's issuer, and none with the signer's id."""
        if caller is None or self._policy is None:
            return
        signer = signer or signer_in(caller.issuer).encode()
        if not signer:
            return
        issuer = self._policy.issuer_of(caller.issuer)
        if issuer is not None and issuer.jwks and signer not in [key["kid"].encode() for key in issuer.jwks["keys"]]:
            raise Unauthenticated("the key that signed the token is no longer in the policy: use another token")

    def _decide(self, rpc: str, caller: bytes | None, model: str | None) -> Decision:
        # The gateway's own checks of this instance name no caller. It lets no such call of others pass.
        if (
            caller == SERVICE
            or (caller is None and is_health_check(rpc))
            or (caller == LAUNCHER and rpc in OF_LAUNCHER)
        ):
            return _ALLOWED
        return self._known(caller).decide(rpc, model)

    def _known(self, caller: bytes | None) -> _Known:
        known = self._callers.get(caller)
        if known is None:
            if len(self._callers) >= _CALLERS:
                self._callers.clear()
            if self._policy is None:
                raise Unavailable("this instance does not know the policy yet, and refuses every caller: retry")
            found = _verified(self._policy, caller)
            addresses = self._addresses_of(found)
            known = self._callers[caller] = _Known(Applicable(self._policy, found), addresses, self._count_kept)
        return known

    def _count_kept(self) -> None:
        self._kept += 1
        if self._kept >= _TOGETHER:
            self._kept = 0
            self._callers.clear()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRY_CHECK_S)
            self._end_open_calls()

    def _end_open_calls(self) -> None:
        """End the open calls that are not allowed, whose token has expired, or whose signer's key was removed."""
        now = self._now()
        for call, (rpc, caller, end, signer) in list(self._open.items()):
            try:
                admitted = self.check(rpc, caller)
                self._check_signer(admitted, signer)
                if admitted is None or now <= admitted.expires_at:
                    continue
                error: ShoalError = Unauthenticated("the token has expired")
            except ShoalError as err:
                error = err
            del self._open[call]
            log.info(
                "a call of %(method)s ends: %(reason)s",
                {"event": "call.ended_by_policy", "method": rpc, "reason": error.message},
            )
            end(error)


def _verified(policy: Policy, caller: bytes | None) -> Caller | None:
    if caller is None:
        return None
    if caller.startswith(CONNECTOR):
        return connector(*json.loads(caller.removeprefix(CONNECTOR)))
    return caller_of(policy, caller_header.claims(caller))
