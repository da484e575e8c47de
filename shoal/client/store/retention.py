"""Retention rules and quotas of results, and the space that results take."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from shoal.client.models.registry import of_time
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import InvalidArgument
from shoal.store.v1 import store_pb2 as store

CALL_S = 10.0
"""Timeout of one small read or write."""
RECOUNT_S = 600.0
"""Timeout of a recount, which takes about a minute for some million results."""

_PAGE = 1_000


class Kept(StrEnum):
    """Subject of a retention rule."""

    RESULTS = "results"
    """Whole results. A tombstone remains, which prevents a second result of the job."""
    ANSWERS = "answers"
    """Models' answers; the rest of the result stays."""
    TOMBSTONES = "tombstones"
    """Remains of removed results."""


@dataclass(frozen=True)
class RetentionRule:
    """One retention rule."""

    kept: Kept
    tenant: str | None = None
    """None: every tenant without a rule of its own."""
    keep: timedelta | None = None
    """Age at removal; None keeps for ever."""
    updated_at: datetime | None = None


@dataclass(frozen=True)
class TenantUsage:
    """Space that one tenant's results and payloads take."""

    tenant: str
    results: int
    bytes: int
    """Size compared with the quota: answers and payloads, plus 512 bytes for each result and each payload."""
    quota_bytes: int | None = None
    recounted_at: datetime | None = None
    """Time of the last full recount."""
    payloads: int = 0
    """Large requests of jobs, kept until the job has ended; longer when it failed."""
    payload_bytes: int = 0
    """Part of `bytes` that is payloads."""


@dataclass(frozen=True)
class StoreUsage:
    """Contents of a store by tenant, and its artifacts."""

    tenants: tuple[TenantUsage, ...]
    """Ordered by name."""
    artifacts: int
    """Number of models and payloads, each counted once, whatever the number of references."""
    artifact_bytes: int


class RetentionAndQuotas:
    """Retention and quota methods of `client.store`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def retention(self, *, timeout: float | None = CALL_S) -> builtins.list[RetentionRule]:
        """Return all retention rules."""
        request = store.ListRetentionRequest()
        response = await self._caller.call(methods.LIST_RETENTION, request, timeout_s=timeout, doing="list retention")
        return [_of_rule(rule) for rule in response.rules]

    async def set_retention(
        self, kept: Kept | str, keep: timedelta | None, *, tenant: str | None = None, timeout: float | None = CALL_S
    ) -> None:
        """Set a rule: remove `kept` older than `keep` (None: never), of one tenant or of all without their own rule.

        Raises:
            InvalidArgument: the message names the field.
        """
        rule = _to_rule(kept, tenant)
        if keep is not None:
            rule.keep.FromTimedelta(keep)
        request = store.SetRetentionRequest(rule=rule)
        await self._caller.call(methods.SET_RETENTION, request, timeout_s=timeout, doing="set retention")

    async def remove_retention(
        self, kept: Kept | str, *, tenant: str | None = None, timeout: float | None = CALL_S
    ) -> None:
        """Remove a rule; the rule for all tenants, if any, applies again."""
        request = store.SetRetentionRequest(rule=_to_rule(kept, tenant), remove=True)
        await self._caller.call(methods.SET_RETENTION, request, timeout_s=timeout, doing="remove retention")

    async def usage(self, *, recount: bool = False, timeout: float | None = None) -> StoreUsage:
        """Return the space that each tenant's results and payloads take. With `recount`, count everything first."""
        tenants: builtins.list[TenantUsage] = []
        limit_s = (RECOUNT_S if recount else CALL_S) if timeout is None else timeout
        token, deadline = "", self._caller.deadline(limit_s)
        while True:
            request = store.ListUsageRequest(page_size=_PAGE, page_token=token, recount=recount)
            response = await self._caller.call(methods.LIST_USAGE, request, timeout_s=deadline, doing="list usage")
            tenants += map(_of_usage, response.usages)
            token = response.next_page_token
            if not token:
                return StoreUsage(tuple(tenants), response.artifacts, response.artifact_bytes)

    async def set_quota(self, most_bytes: int, *, tenant: str | None = None, timeout: float | None = CALL_S) -> None:
        """Set the quota of a tenant's results and payloads, or of each tenant without its own quota.

        A tenant over its quota cannot submit jobs until space is free again.

        Raises:
            InvalidArgument: the message names the field.
        """
        request = store.SetQuotaRequest(bytes=most_bytes, tenant=tenant)
        await self._caller.call(methods.SET_QUOTA, request, timeout_s=timeout, doing="set a quota")

    async def remove_quota(self, *, tenant: str | None = None, timeout: float | None = CALL_S) -> None:
        """Remove a quota; the quota for all tenants, if any, applies again."""
        request = store.SetQuotaRequest(remove=True, tenant=tenant)
        await self._caller.call(methods.SET_QUOTA, request, timeout_s=timeout, doing="remove a quota")


def _to_rule(kept: Kept | str, tenant: str | None) -> store.RetentionRule:
    if kept not in list(Kept):
        raise InvalidArgument(f"retention of {str(kept)!r}: use one of {', '.join(Kept)}")
    return store.RetentionRule(collection=f"COLLECTION_{Kept(kept).name}", tenant=tenant)


def _of_rule(rule: store.RetentionRule) -> RetentionRule:
    name = store.RetentionRule.Collection.Name(rule.collection).removeprefix("COLLECTION_")
    keep = rule.keep.ToTimedelta() if rule.HasField("keep") else None
    return RetentionRule(
        Kept[name], rule.tenant if rule.HasField("tenant") else None, keep, of_time(rule, "updated_at")
    )


def _of_usage(usage: store.TenantUsage) -> TenantUsage:
    quota = usage.quota_bytes if usage.HasField("quota_bytes") else None
    return TenantUsage(
        usage.tenant,
        usage.results,
        usage.bytes,
        quota,
        of_time(usage, "recounted_at"),
        usage.payloads,
        usage.payload_bytes,
    )
