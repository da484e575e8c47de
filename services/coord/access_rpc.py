"""gRPC servicer of AccessService: translates messages, without logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.rpc.access import caller_in
from mesh.rpc.interceptors import Context
from services.coord.keys import Keys, Record
from services.coord.messages import timestamp
from services.coord.policies import Applied, Policies
from shoal.access.caller_header import LAUNCHER, SIGNER_HEADER, claims
from shoal.access.cluster import signer_in
from shoal.coord.v1 import access_pb2 as pb
from shoal.coord.v1 import access_pb2_grpc as pb_grpc
from shoal.errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True)
class AccessParts:
    """Components that the methods call."""

    policies: Policies
    keys: Keys


class AccessRpc(pb_grpc.AccessServiceServicer):
    """Servicer of AccessService; `parts` is None on a node without authentication."""

    def __init__(self, parts: AccessParts | None) -> None:
        self._parts = parts

    @property
    def _policies(self) -> Policies:
        return self._there.policies

    @property
    def _keys(self) -> Keys:
        return self._there.keys

    @property
    def _there(self) -> AccessParts:
        if self._parts is None:
            raise FailedPrecondition("this node does not authenticate callers: start it with `shoal up --auth`")
        return self._parts

    async def GetPolicy(self, request: pb.GetPolicyRequest, ctx: Context) -> pb.GetPolicyResponse:
        found = await self._policies.get(request.version)
        in_force = "" if request.version else self._policies.in_force()
        return pb.GetPolicyResponse(
            policy=_version(found), document=found.document, files=found.files or {}, in_force=in_force
        )

    async def ListPolicies(self, request: pb.ListPoliciesRequest, ctx: Context) -> pb.ListPoliciesResponse:
        return pb.ListPoliciesResponse(policies=[_version(one) for one in await self._policies.history()])

    async def ApplyPolicy(self, request: pb.ApplyPolicyRequest, ctx: Context) -> pb.ApplyPolicyResponse:
        policies, author = self._policies, _author(ctx)
        applied, late = await policies.apply(
            request.document,
            dict(request.files),
            author,
            await self._keys.valid_claims(),
            while_valid=await self._keys.while_valid(author),
            signer=_signer(ctx),
            expected=request.expected_version,
            force=request.force,
        )
        return pb.ApplyPolicyResponse(policy=_version(applied), unconfirmed=late)

    async def RollBackPolicy(self, request: pb.RollBackPolicyRequest, ctx: Context) -> pb.RollBackPolicyResponse:
        if not request.version:
            raise InvalidArgument("version 0: expected one of `shoal policy history`, which begins with 1")
        earlier, author = await self._policies.get(request.version), _author(ctx)
        applied, late = await self._policies.apply(
            earlier.document,
            earlier.files or {},
            author,
            await self._keys.valid_claims(),
            while_valid=await self._keys.while_valid(author),
            signer=_signer(ctx),
            force=request.force,
            rolled_back_to=earlier.version,
        )
        return pb.RollBackPolicyResponse(policy=_version(applied), unconfirmed=late)

    async def CreateKey(self, request: pb.CreateKeyRequest, ctx: Context) -> pb.CreateKeyResponse:
        record, key = await self._keys.create(
            tenant=request.tenant,
            role=request.role,
            subject=request.subject,
            models=tuple(request.models),
            grants=tuple(request.grants),
            life_s=request.life_seconds,
            caller=_author(ctx),
        )
        return pb.CreateKeyResponse(info=_info(record), key=key.text)

    async def ListKeys(self, request: pb.ListKeysRequest, ctx: Context) -> pb.ListKeysResponse:
        return pb.ListKeysResponse(keys=[_info(record) for record in await self._keys.records()])

    async def RevokeKey(self, request: pb.RevokeKeyRequest, ctx: Context) -> pb.RevokeKeyResponse:
        await self._keys.revoke(request.id)
        return pb.RevokeKeyResponse()

    async def RotateSigner(self, request: pb.RotateSignerRequest, ctx: Context) -> pb.RotateSignerResponse:
        keys = self._keys
        kid, key, late = await keys.rotate(
            is_stolen=request.stolen, caller=_author(ctx), renews_own=request.renew_own_key
        )
        return pb.RotateSignerResponse(signer=kid, key="" if key is None else key.text, unconfirmed=late)


def _author(ctx: Context) -> Mapping[str, Any] | None:
    """Return the claims of the caller; None for the node's user. Raises Unauthenticated for a call without a token."""
    caller = caller_in(ctx) or b""
    return None if caller == LAUNCHER else claims(caller)


def _signer(ctx: Context) -> str:
    """Return the id of the public key that has verified the caller's token, which the gateway or the issuer names.

    Empty: neither does.
    """
    named = str(dict(ctx.invocation_metadata() or ()).get(SIGNER_HEADER, ""))
    author = _author(ctx)
    return named or ("" if author is None else signer_in(str(author.get("iss"))))


def _version(applied: Applied) -> pb.PolicyVersion:
    return pb.PolicyVersion(
        version=applied.version,
        applied_at=timestamp(applied.applied_at),
        applied_by=applied.applied_by,
        forced=applied.forced,
        rolled_back_to=applied.rolled_back_to,
    )


def _info(record: Record) -> pb.KeyInfo:
    return pb.KeyInfo(
        id=record.id,
        tenant=record.tenant,
        role=record.role,
        subject=record.subject,
        models=record.models,
        grants=record.grants,
        created_at=timestamp(record.created_at),
        expires_at=timestamp(record.expires_at),
        signer=record.signer,
        revoked=record.is_revoked,
    )
