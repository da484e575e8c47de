"""Authorisation of jobs by model: at the submit, and again at each attempt, because grants change in between.

    submit ──check──> job with its caller's claims (never the token) ──attempt──> `refusal`: None, or the end

A job is an inference that runs later: the decision about Submit includes that about ModelInfer (shoal.access.decision).
"""

from __future__ import annotations

from mesh.rpc.access import Access
from mesh.rpc.tenant_scope import TenantScope
from services.ingest.limits import CALLER_BYTES
from shoal.access.rpc_groups import SUBMIT
from shoal.errors import InvalidArgument, PermissionDenied, ShoalError, Unauthenticated


def checked_caller(scope: TenantScope, model: str) -> bytes:
    """Return the caller to be stored with work for `model`; empty without a policy.

    Raises:
        PermissionDenied: the caller may not run the model. InvalidArgument: its claims are too long.
    """
    if scope.access is None:
        return b""
    scope.access.check(SUBMIT, scope.caller, model)
    return storable_caller(scope)


def storable_caller(scope: TenantScope) -> bytes:
    """Return the caller to be stored with work; empty without a policy. Raises InvalidArgument when it is too long."""
    if scope.access is None:
        return b""
    caller = scope.access.storable(scope.caller)
    if len(caller) > CALLER_BYTES:
        raise InvalidArgument(
            f"the claims of the caller's token take {len(caller)} bytes; at most {CALLER_BYTES} are stored with a job"
        )
    return caller


def refusal(access: Access | None, caller: bytes, model: str) -> ShoalError | None:
    """Return the reason for which a stored caller may not run `model` any more; None when it may.

    Raises:
        Unavailable: the policy is not known yet.
    """
    if access is None:
        return None
    try:
        access.check(SUBMIT, caller or None, model)
    except (PermissionDenied, Unauthenticated) as err:
        return err
    return None
