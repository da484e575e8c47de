"""Server of Envoy's rate limit quota service: each Envoy counts requests against shares of the limits.

    Envoy ──usage of its buckets, every 5 s; a new bucket at once──> QuotaServer ──claim, each second──> shares
      └──────────────<── assignments that have changed ──<─────────────────┘

No call waits for it. Service: envoy.service.rate_limit_quota.v3.RateLimitQuotaService.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from mesh.metrics.limits import RefusedCounts
from mesh.process.tasks import end
from mesh.rpc.interceptors import Context
from mesh.xds.limits import bucket_of_id, id_of_bucket
from mesh.xds.quota_messages import DENY_ALL, Reports, Response
from shoal.access.limits import Amount, Bucket, Kind, amount_of
from shoal.access.policy import Limit
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

QUOTA_SERVICE = "envoy.service.rate_limit_quota.v3.RateLimitQuotaService"
BUCKETS = 10_000
"""Buckets of one Envoy whose shares are renewed. Each takes about 1 kB."""
IDLE_S = 30.0
"""Time without a request after which an Envoy forgets a bucket, if its burst is whole again."""
# Usages of a report that are taken in one iteration of the event loop.
_STEP = 500
# Time that several new buckets have to be claimed together; and in parts of the time that a claim takes.
_TOGETHER_S, _TOGETHER_PART = 0.002, 10.0
# A demand is measured over at least so long.
_MEASURED_S = 1.0
# Envoy counts whole tokens for each interval, which must be whole seconds: so a rate has thousandths.
_FILL_S = 1_000
_MOST_TOKENS = (1 << 32) - 1
# Life of an assignment that is to end when nobody renews it: three reports of Envoy.
_LIFE_S = 15
_RENEWED_S = 5.0
# Life of an assignment that is kept: ten years. Envoy has no other form that keeps one.
_FOR_EVER_S = 315_360_000


class Claims(Protocol):
    """Source of shares."""

    renew_s: float
    """Interval of claims."""

    async def claim(
        self, claimant: str, demands: Mapping[Bucket, float], held: Mapping[Bucket, float]
    ) -> Mapping[Bucket, Amount]:
        """Return the shares of a claimant, which replace its former ones, `held`. Raises ShoalError when it cannot."""

    def leave(self, claimant: str) -> None:
        """Release all shares of a claimant."""

    def limit(self, name: str) -> Limit | None:
        """Return a limit of the policy in force."""

    async def changed(self) -> None:
        """Return when the policy has changed."""


@dataclass
class _Usage:
    """A bucket of an Envoy."""

    requests: int = 0
    since: float = 0.0
    used_at: float = 0.0
    demand: float = math.inf
    """Requests a second, refused ones included."""
    assigned: Amount | None = None
    assigned_at: float = 0.0


class _Gateway:
    """Buckets of one connected Envoy. `now` is a monotonic time in seconds."""

    def __init__(self, refused: RefusedCounts) -> None:
        self._usages: dict[Bucket, _Usage] = {}
        self._refused = refused

    def report(self, usages: Iterable[Any], now: float) -> bool:
        """Take a report, or a part of one. Return True when it has a bucket that was not known."""
        before = len(self._usages)
        for each in usages:
            bucket = bucket_of_id({entry.key: entry.value for entry in each.bucket_id.bucket})
            if bucket is not None:
                if each.num_requests_denied:
                    self._refused.add(bucket.limit, bucket.kind, each.num_requests_denied)
                self._count(bucket, each.num_requests_allowed + each.num_requests_denied, now)
        return len(self._usages) > before

    def _count(self, bucket: Bucket, requests: int, now: float) -> None:
        usage = self._usages.get(bucket)
        if usage is None:
            self._usages[bucket] = _Usage(since=now, used_at=now)
            return
        usage.requests += requests
        if requests:
            usage.used_at = now
        if (measured_s := now - usage.since) >= _MEASURED_S:
            usage.demand, usage.requests, usage.since = usage.requests / measured_s, 0, now

    def demands(self) -> dict[Bucket, float]:
        """Return the demand of each bucket whose share is renewed: the latest that were used, if there are too many."""
        if len(self._usages) <= BUCKETS:
            return {bucket: usage.demand for bucket, usage in self._usages.items()}
        latest = sorted(self._usages.items(), key=lambda each: each[1].used_at, reverse=True)
        return {bucket: usage.demand for bucket, usage in latest[:BUCKETS]}

    def held(self) -> dict[Bucket, float]:
        """Return the shares that Envoy has."""
        return {bucket: usage.assigned.amount for bucket, usage in self._usages.items() if usage.assigned is not None}

    def actions(self, shares: Mapping[Bucket, Amount], limit: Callable[[str], Limit | None], now: float) -> Any:
        """Return the response with the assignments that have changed; None when there are none.

        Envoy forgets buckets that were idle until they were full again, those of limits that the policy does not have,
        and those beyond BUCKETS.
        """
        response = Response()
        for bucket, usage in list(self._usages.items()):
            found, share = limit(bucket.limit), shares.get(bucket)
            is_beyond = share is None and len(self._usages) > BUCKETS
            if found is None or is_beyond or now - usage.used_at >= max(IDLE_S, _refill_s(found)):
                del self._usages[bucket]
                _action(response, bucket).abandon_action.SetInParent()
            elif share is not None and _is_due(usage, share, found, now):
                usage.assigned, usage.assigned_at = share, now
                _assign(_action(response, bucket).quota_assignment_action, share, found)
        return response if response.bucket_action else None


def _refill_s(limit: Limit) -> float:
    """Return the time in which an empty bucket fills. A bucket that is forgotten before begins with its whole burst."""
    whole = amount_of(limit, Kind.REQUESTS)
    return 0.0 if whole is None else whole.burst / whole.amount


def _is_due(usage: _Usage, share: Amount, limit: Limit, now: float) -> bool:
    is_renewed = limit.unrenewed != "keep" and now - usage.assigned_at >= _RENEWED_S
    return usage.assigned != share or is_renewed


def _action(response: Any, bucket: Bucket) -> Any:
    action = response.bucket_action.add()
    for key, value in id_of_bucket(bucket).items():
        action.bucket_id.bucket.add(key=key, value=value)
    return action


def _assign(action: Any, share: Amount, limit: Limit) -> None:
    action.assignment_time_to_live.seconds = _FOR_EVER_S if limit.unrenewed == "keep" else _LIFE_S
    if share.amount <= 0.0:
        action.rate_limit_strategy.blanket_rule = DENY_ALL
        return
    bucket = action.rate_limit_strategy.token_bucket
    # With less than one token, no request would ever pass.
    bucket.max_tokens = min(max(1, round(share.burst)), _MOST_TOKENS)
    bucket.tokens_per_fill.value = min(max(1, round(share.amount * _FILL_S)), _MOST_TOKENS)
    bucket.fill_interval.seconds = _FILL_S


class QuotaServer:
    """Claims shares for the buckets of each connected Envoy, and assigns them.

    Args:
        origin: this instance, of which the names of claimants are made.
    """

    def __init__(self, claims: Claims, origin: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._claims = claims
        self._origin = origin
        self._clock = clock
        self._numbers: Iterator[int] = itertools.count()
        self.refused = RefusedCounts()

    def methods(self) -> dict[str, Any]:
        """Return the methods for a server, by path."""
        method = grpc.stream_stream_rpc_method_handler(
            self._stream, request_deserializer=Reports.FromString, response_serializer=Response.SerializeToString
        )
        return {f"/{QUOTA_SERVICE}/StreamRateLimitQuotas": method}

    async def _stream(self, reports: AsyncIterator[Any], ctx: Context) -> AsyncIterator[Any]:
        claimant = f"{self._origin}/gateway-{next(self._numbers)}"
        gateway, news, took_s = _Gateway(self.refused), asyncio.Event(), 0.0

        async def read() -> None:
            async for message in reports:
                usages = message.bucket_quota_usages
                for begin in range(0, len(usages), _STEP):
                    if gateway.report(usages[begin : begin + _STEP], self._clock()):
                        news.set()
                    await asyncio.sleep(0)

        reading = asyncio.create_task(read(), name="usage of quotas")
        changing = asyncio.create_task(self._claims.changed())
        try:
            while not reading.done():
                waiting = asyncio.create_task(news.wait())
                await asyncio.wait(
                    [reading, changing, waiting], timeout=self._claims.renew_s, return_when=asyncio.FIRST_COMPLETED
                )
                waiting.cancel()
                if news.is_set():
                    await asyncio.sleep(max(_TOGETHER_S, _TOGETHER_PART * took_s))
                    news.clear()
                if changing.done():
                    changing = asyncio.create_task(self._claims.changed())
                began = self._clock()
                response = await self._renewed(claimant, gateway)
                took_s = self._clock() - began
                if response is not None:
                    yield response
            reading.result()
        finally:
            await end(reading, changing)
            self._claims.leave(claimant)

    async def _renewed(self, claimant: str, gateway: _Gateway) -> Any:
        """Return a response with the shares that have changed; None when there are none, or none can be had."""
        if not (demands := gateway.demands()):
            return None
        try:
            shares = await self._claims.claim(claimant, demands, gateway.held())
        except ShoalError as err:
            log.warning(
                "the shares of %(claimant)s stay the last ones: %(error)s",
                {"event": "limits.shares_stale", "claimant": claimant, "error": err.message},
            )
            return None
        self.refused.keep(lambda name: self._claims.limit(name) is not None)
        return gateway.actions(shares, self._claims.limit, self._clock())
