"""How long results are kept, and how much room they take."""

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
"""One small read or write."""
RECOUNT_S = 600.0
"""Counting all results takes about a minute for some million."""

_PAGE = 1_000


class Kept(StrEnum):
    """What a rule is about."""

    RESULTS = "results"
    """Whole results. What is left lets their jobs have no other result."""
    ANSWERS = "answers"
    """The models' answers: the rest of a result stays."""
    TOMBSTONES = "tombstones"
    """What is left of removed results."""


@dataclass(frozen=True)
class RetentionRule:
    """How long something is kept."""

    kept: Kept
    tenant: str | None = None
    """None: every tenant that has no rule of its own."""
    keep: timedelta | None = None
    """None: for ever."""
    updated_at: datetime | None = None


@dataclass(frozen=True)
class TenantUsage:
    """What one tenant's results and payloads take."""

    tenant: str
    results: int
    bytes: int
    """What a quota is compared with: answers and payloads, and 512 bytes for each result and each payload."""
    quota_bytes: int | None = None
    recounted_at: datetime | None = None
    """When its results and payloads were last counted one by one."""
    payloads: int = 0
    """Large requests of its jobs that are kept until the jobs have ended; longer when they failed."""
    payload_bytes: int = 0
    """What these are of `bytes`."""


@dataclass(frozen=True)
class StoreUsage:
    """What a store holds."""

    tenants: tuple[TenantUsage, ...]
    """In the order of their names."""
    artifacts: int
    """Models and payloads, each once, whoever they count for."""
    artifact_bytes: int


class Keeping:
    """This part of `client.store`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def retention(self, *, timeout: float = CALL_S) -> builtins.list[RetentionRule]:
        """All rules of retention."""
        request = store.ListRetentionRequest()
        answer = await self._caller.call(methods.LIST_RETENTION, request, timeout_s=timeout, doing="list retention")
        return [_of_rule(rule) for rule in answer.rules]

    async def set_retention(
        self, kept: Kept | str, keep: timedelta | None, *, tenant: str | None = None, timeout: float = CALL_S
    ) -> None:
        """Has `kept` removed once it is older than `keep` (None: never), for a tenant, or for all without an own rule.

        Raises:
            InvalidArgument: names what is wrong.
        """
        rule = _to_rule(kept, tenant)
        if keep is not None:
            rule.keep.FromTimedelta(keep)
        request = store.SetRetentionRequest(rule=rule)
        await self._caller.call(methods.SET_RETENTION, request, timeout_s=timeout, doing="set retention")

    async def remove_retention(self, kept: Kept | str, *, tenant: str | None = None, timeout: float = CALL_S) -> None:
        """Removes a rule: the one for everybody counts again, or none."""
        request = store.SetRetentionRequest(rule=_to_rule(kept, tenant), remove=True)
        await self._caller.call(methods.SET_RETENTION, request, timeout_s=timeout, doing="remove retention")

    async def usage(self, *, recount: bool = False, timeout: float | None = None) -> StoreUsage:
        """What each tenant's results and payloads take. With `recount` all are counted one by one first."""
        tenants: builtins.list[TenantUsage] = []
        token = ""
        while True:
            request = store.ListUsageRequest(page_size=_PAGE, page_token=token, recount=recount)
            limit_s = timeout or (RECOUNT_S if recount else CALL_S)
            answer = await self._caller.call(methods.LIST_USAGE, request, timeout_s=limit_s, doing="list usage")
            tenants += map(_of_usage, answer.usages)
            token = answer.next_page_token
            if not token:
                return StoreUsage(tuple(tenants), answer.artifacts, answer.artifact_bytes)

    async def set_quota(self, most_bytes: int, *, tenant: str | None = None, timeout: float = CALL_S) -> None:
        """Lets a tenant's results and payloads, or those of each without an own quota, take so many bytes.

        Who has used that up cannot submit jobs until there is room again.

        Raises:
            InvalidArgument: names what is wrong.
        """
        request = store.SetQuotaRequest(bytes=most_bytes, tenant=tenant)
        await self._caller.call(methods.SET_QUOTA, request, timeout_s=timeout, doing="set a quota")

    async def remove_quota(self, *, tenant: str | None = None, timeout: float = CALL_S) -> None:
        """Removes a quota: the one for everybody counts again, or none."""
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
