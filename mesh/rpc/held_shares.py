"""Shares of a policy's limits in one process: a call is counted before it runs, and its end is counted exactly once.

    caller, model ──limits_of──> CallLimits ──reserve(bytes, rows)──> Reservation ──end──> nothing in flight
                                     └── LimitReached: nothing is counted

A share is the part of one bucket of a limit that this process may use. In a cluster, coord grants shares by demand
(`share_renewal.py`), and a bucket that is new here has a provisional share until then. A server without a cluster has
its part of each limit for good. Requests, bytes and rows have a token bucket each; what is in flight is a count.

A request larger than the burst of a share is admitted when the bucket is full, and counts whole: the rate holds.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from mesh.metrics.limits import RefusedCounts
from shoal.access.decision import Caller
from shoal.access.limits import Amount, Bucket, Kind, amount_of, at_gateway, bucket_of, in_services, rate_limit_field
from shoal.access.patterns import matches_any
from shoal.access.policy import Limit, Policy
from shoal.errors import RATE_LIMIT_KEY, Code, LimitReached, ShoalError

BUCKETS = 8_192
"""Buckets of one process, at most: 0.5 kB each; coord takes 10,000 in one claim. Beyond it, the least recently
used ones are forgotten of which nothing is in flight, and full ones before all others."""
FORGOTTEN_AFTER_S = 300.0
"""A full bucket that no call has met for so long is forgotten, and its share goes to others."""
PROVISIONAL_PARTS = 8
"""A new bucket has one part in so many of its limit until coord has granted a share, some milliseconds later. Up to so
many processes that meet a bucket at once exceed its limit by the limit itself at most."""
IN_FLIGHT_RETRY_MS = 100
"""Time after which a call is repeated that others in flight have refused: their ends are not known."""

# The least recently used buckets are found in a millisecond: so many are forgotten at once.
_FORGOTTEN_AT_ONCE = BUCKETS // 16
# Longest time that a refused caller is told to wait: shares change meanwhile.
_LONGEST_RETRY_S = 60.0
# A limit that holds no more (`unrenewed: open`), in units a second and at once.
_OPEN = Amount(1e15, 1e15)

_COSTS = {Kind.REQUESTS: 0, Kind.BYTES: 1, Kind.ROWS: 2}
_ROWS = _COSTS[Kind.ROWS]
_WORDS = {
    Kind.REQUESTS: "requests a second",
    Kind.IN_FLIGHT: "requests in flight",
    Kind.BYTES: "bytes of requests a second",
    Kind.ROWS: "rows a second",
}


class Share(ABC):
    """This process's part of one bucket, and its use."""

    __slots__ = ("at", "bucket", "expires_at", "is_granted", "limit", "whole")

    def __init__(self, bucket: Bucket, limit: Limit, whole: Amount, now: float) -> None:
        self.bucket = bucket
        self.limit = limit
        self.whole = whole
        """The number of the limit."""
        self.at = now
        """Time of the last call that was counted here."""
        self.is_granted = False
        """False for a provisional share."""
        self.expires_at = math.inf

    @abstractmethod
    def set(self, amount: Amount, now: float, *, is_first: bool = False) -> None:
        """Set what this process may use. What is used stays used. The first share of a bucket has its whole burst."""

    @abstractmethod
    def demand(self, now: float) -> float:
        """Return what callers wanted since the last call of `demand`, refused calls included.

        Units a second; of what is in flight, the highest number at one time.
        """

    @property
    @abstractmethod
    def amount(self) -> float:
        """Units a second of the share, or of what is in flight the most at one time."""

    @property
    def is_in_use(self) -> bool:
        """True while a call is in flight here."""
        return False

    def is_full(self, now: float) -> bool:
        """Return True when the whole burst is left: a bucket that begins anew gives its callers nothing more."""
        return True


class Rate(Share):
    """A token bucket."""

    __slots__ = ("_since", "burst", "cost", "level", "rate", "refused", "taken")

    def __init__(self, bucket: Bucket, limit: Limit, whole: Amount, now: float) -> None:
        super().__init__(bucket, limit, whole, now)
        self.cost = _COSTS[bucket.kind]
        """Index of what a call costs here."""
        self.rate = self.burst = 0.0
        self.level = 0.0
        """Units that were left at the time `at`; below 0 after a large request."""
        self.taken = self.refused = 0.0
        """Units since the last claim."""
        self._since = now

    def set(self, amount: Amount, now: float, *, is_first: bool = False) -> None:
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        # Less what a provisional share has used.
        if is_first:
            self.level += amount.burst - self.burst
        self.rate = amount.amount
        # A share of less than one unit fills up to one, or no call would ever pass.
        self.burst = max(amount.burst, 1.0)
        # Without a share nothing is left, and every call is refused.
        self.level = min(self.level, self.burst if amount.amount > 0 else 0.0)

    def demand(self, now: float) -> float:
        wanted = (self.taken + self.refused) / max(now - self._since, 0.001)
        self._since, self.taken, self.refused = now, 0.0, 0.0
        # More was given back than taken.
        return max(wanted, 0.0)

    @property
    def amount(self) -> float:
        return self.rate

    def is_full(self, now: float) -> bool:
        return self.level + (now - self.at) * self.rate >= self.burst


class InFlight(Share):
    """A count of the calls in flight."""

    __slots__ = ("count", "most", "peak", "refused")

    def __init__(self, bucket: Bucket, limit: Limit, whole: Amount, now: float) -> None:
        super().__init__(bucket, limit, whole, now)
        self.count = self.most = 0
        self.peak = self.refused = 0
        """The most in flight, and the refused calls, since the last claim."""

    def set(self, amount: Amount, now: float, *, is_first: bool = False) -> None:
        self.most = int(amount.amount)

    def demand(self, now: float) -> float:
        # A refused call that is repeated counts again: no more than the limit is wanted.
        wanted = min(self.peak + self.refused, max(self.whole.amount, self.peak))
        self.peak, self.refused = self.count, 0
        return wanted

    @property
    def amount(self) -> float:
        return self.most

    @property
    def is_in_use(self) -> bool:
        return self.count > 0


class CallLimits:
    """The shares in which the calls of one caller and model count."""

    __slots__ = ("_clock", "_in_flight", "_rates", "_refused")

    def __init__(self, shares: Iterable[Share], clock: Callable[[], float], refused: RefusedCounts) -> None:
        found = tuple(shares)
        self._refused = refused
        self._in_flight = tuple(share for share in found if isinstance(share, InFlight))
        self._rates = tuple(share for share in found if isinstance(share, Rate))
        self._clock = clock

    def reserve(self, nbytes: int, rows: int) -> Reservation:
        """Count a call of `nbytes` and `rows`. The caller ends the reservation.

        Raises:
            LimitReached: a share is used up. Nothing is counted.
        """
        now = self._clock()
        for share in self._in_flight:
            if share.count >= share.most:
                share.at = now
                share.refused += 1
                self._refused.add(share.bucket.limit, share.bucket.kind)
                raise _in_flight_reached(share)
        costs = (1, nbytes, rows)
        for rate in self._rates:
            cost = costs[rate.cost]
            level = rate.level + (now - rate.at) * rate.rate
            burst = rate.burst
            if level > burst:
                level = burst
            rate.at = now
            if level < cost and level < burst:
                rate.level = level
                rate.refused += cost
                self._refused.add(rate.bucket.limit, rate.bucket.kind)
                self._give_back(rate, costs)
                raise _rate_reached(rate, cost)
            rate.level = level - cost
            rate.taken += cost
        for share in self._in_flight:
            share.at = now
            share.count = count = share.count + 1
            if count > share.peak:
                share.peak = count
        return Reservation(self, rows)

    def _give_back(self, until: Rate, costs: tuple[int, int, int]) -> None:
        """Give back what was taken before `until` refused."""
        for rate in self._rates:
            if rate is until:
                return
            rate.level += costs[rate.cost]
            rate.taken -= costs[rate.cost]

    @contextmanager
    def reserved(self, nbytes: int, rows: int) -> Iterator[None]:
        """Count a call for as long as the block lasts. Raises as `reserve` does."""
        reservation = self.reserve(nbytes, rows)
        try:
            yield
        except BaseException as err:
            reservation.end(err)
            raise
        reservation.end()

    def end(self, unrun_rows: int) -> None:
        """Count the end of a call, of which so many rows did not run. Called once, by its reservation."""
        for share in self._in_flight:
            share.count -= 1
        if unrun_rows:
            for rate in self._rates:
                if rate.cost == _ROWS:
                    rate.level += unrun_rows
                    rate.taken -= unrun_rows


class Reservation:
    """Units that one call has reserved in its buckets, until its end."""

    __slots__ = ("_limits", "_rows")

    def __init__(self, limits: CallLimits, rows: int) -> None:
        self._limits: CallLimits | None = limits
        self._rows = rows

    def end(self, error: BaseException | None = None) -> None:
        """Count the end of the call, which has failed with `error`, if any. Only the first call has an effect.

        Rows of a request that the server has shed are given back. Others stay counted: they may have run.
        """
        limits, self._limits = self._limits, None
        if limits is not None:
            limits.end(self._rows if error is not None and _is_shed(error) else 0)


def _is_shed(error: BaseException) -> bool:
    """Return True when no model has run the request: by convention, the error then has a time to retry."""
    return (
        isinstance(error, ShoalError)
        and error.retry_after_ms is not None
        and error.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
    )


def _in_flight_reached(share: InFlight) -> LimitReached:
    return _reached(share, share.most, 0, IN_FLIGHT_RETRY_MS, "requests_in_flight")


def _rate_reached(rate: Rate, cost: int) -> LimitReached:
    missing = min(cost, rate.burst) - rate.level
    wait_s = min(missing / rate.rate, _LONGEST_RETRY_S) if rate.rate else 1.0
    setting = f"{rate.bucket.kind}_per_second"
    return _reached(rate, rate.rate, max(int(rate.level), 0), max(1, math.ceil(wait_s * 1000)), setting)


def _reached(share: Share, amount: float, remaining: int, retry_after_ms: int, setting: str) -> LimitReached:
    bucket, whole = share.bucket, share.whole.amount
    unit = f"the model {bucket.model!r} has" if share.limit.per == "model" else f"the tenant {bucket.tenant!r} has"
    if share.limit.per == "key":
        unit = f"the key {bucket.key!r} of the tenant {bucket.tenant!r} has"
    part = "" if amount == whole else f" (this instance has {amount:g} of them now)"
    return LimitReached(
        f"limit {bucket.limit!r} of the policy: {unit} {whole:g} {_WORDS[bucket.kind]}{part}: retry in "
        f"{retry_after_ms} ms with fewer at a time, or ask the operator for a higher {setting}",
        retry_after_ms=retry_after_ms,
        trailing=(
            (RATE_LIMIT_KEY, rate_limit_field(bucket.limit, bucket.kind, whole)),
            ("x-ratelimit-remaining", str(remaining)),
            ("x-ratelimit-reset", str(math.ceil(retry_after_ms / 1000))),
        ),
    )


class HeldShares:
    """The shares of one process.

    Args:
        kinds: numbers of limits that this process counts.
        job_kinds: those that it counts for calls of ingest, which run jobs: ingest has counted others at the submit.
        part: part of each limit that a process has that claims no shares; None: shares are claimed.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        kinds: Collection[Kind],
        job_kinds: Collection[Kind] = (),
        *,
        part: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kinds = frozenset(kinds)
        self._job_kinds = frozenset(job_kinds)
        self._part = part
        self._clock = clock
        self._shares: dict[Bucket, Share] = {}
        self._limits: Mapping[str, Limit] = {}
        self.epoch = 0
        """Raised when a share is dropped: every CallLimits from before is then out of date."""
        self.refused = RefusedCounts()
        self.on_new: Callable[[], None] = lambda: None
        """Called for a share that is provisional, or of a limit that has changed."""

    @property
    def has_limits(self) -> bool:
        """True when the policy has limits that this process counts."""
        return bool(self._limits)

    def set_policy(self, policy: Policy) -> None:
        """Replace the limits. What is in flight, and what is left of a bucket, stays counted."""
        kinds = self._kinds | self._job_kinds
        self._limits = {limit.name: limit for limit in policy.limits if not kinds.isdisjoint(self._counted(limit))}
        self.epoch += 1
        self.refused.keep(self._limits.__contains__)
        now = self._clock()
        for bucket, share in list(self._shares.items()):
            limit = self._limits.get(bucket.limit)
            whole = None if limit is None or limit.per != share.limit.per else amount_of(limit, bucket.kind)
            if limit is None or whole is None:
                del self._shares[bucket]
                continue
            share.limit = limit
            if whole != share.whole:
                share.whole = whole
                if self._part is not None:
                    share.set(_part_of(whole, bucket.kind, self._part), now)
                else:
                    self.on_new()

    def limits_of(
        self, limits: Iterable[Limit], caller: Caller, model: str, *, is_job: bool = False
    ) -> CallLimits | None:
        """Return the shares in which calls count, by the limits that apply to their caller; None without one."""
        kinds = self._job_kinds if is_job else self._kinds
        shares = [
            self._share(bucket_of(limit, kind, caller, model), limit)
            for limit in limits
            if matches_any(limit.models, model)
            for kind in self._counted(limit)
            if kind in kinds
        ]
        return CallLimits(shares, self._clock, self.refused) if shares else None

    def demands(self) -> dict[Bucket, float]:
        """Forget the full buckets that no call has met for long, and return the demands of the others."""
        now = self._clock()
        unmet = [share for share in self._shares.values() if now - share.at > FORGOTTEN_AFTER_S]
        self._forget([share for share in unmet if not share.is_in_use and share.is_full(now)])
        return {bucket: share.demand(now) for bucket, share in self._shares.items()}

    def held(self) -> dict[Bucket, float]:
        """Return the granted shares that count still: an expired one where its limit says so."""
        now = self._clock()
        return {
            bucket: share.amount
            for bucket, share in self._shares.items()
            if share.is_granted and (now < share.expires_at or share.limit.unrenewed == "keep")
        }

    @property
    def in_flight(self) -> int:
        """Calls that are counted in flight now; a call counts in each of its limits."""
        return sum(share.count for share in self._shares.values() if isinstance(share, InFlight))

    def grant(self, granted: Mapping[Bucket, Amount], lifetime_s: float) -> None:
        """Set the granted shares, which expire after `lifetime_s`."""
        now = self._clock()
        for bucket, amount in granted.items():
            if (share := self._shares.get(bucket)) is not None:
                share.set(amount, now, is_first=not share.is_granted)
                share.is_granted = True
                share.expires_at = now + lifetime_s

    def expire(self, lifetime_s: float) -> None:
        """Apply what the policy says to the shares that nobody has renewed; new ones expire after `lifetime_s`."""
        now = self._clock()
        for share in self._shares.values():
            if share.expires_at == math.inf and not share.is_granted:
                share.expires_at = now + lifetime_s
            if share.expires_at <= now:
                if share.limit.unrenewed == "open":
                    # The bucket is full at once: a first grant takes the burst of _OPEN away again.
                    share.set(_OPEN, now, is_first=True)
                elif share.limit.unrenewed == "deny":
                    share.set(Amount(0.0), now)

    def _counted(self, limit: Limit) -> tuple[Kind, ...]:
        """Return the numbers of a limit that services count. Without a cluster, no gateway counts requests."""
        is_alone = self._part is not None and at_gateway(limit)
        return (*in_services(limit), *((Kind.REQUESTS,) if is_alone else ()))

    def _share(self, bucket: Bucket, limit: Limit) -> Share:
        share = self._shares.get(bucket)
        if share is None:
            now = self._clock()
            if len(self._shares) >= BUCKETS:
                idle = [share for share in self._shares.values() if not share.is_in_use]
                # Calls of models that do not exist, which count nowhere, have full buckets.
                idle.sort(key=lambda share: (not share.is_full(now), share.at))
                self._forget(idle[:_FORGOTTEN_AT_ONCE])
            whole = amount_of(limit, bucket.kind)
            assert whole is not None, "_counted returns kinds that the limit has"
            kind = InFlight if bucket.kind is Kind.IN_FLIGHT else Rate
            share = self._shares[bucket] = kind(bucket, limit, whole, now)
            share.set(_part_of(whole, bucket.kind, self._part or 1 / PROVISIONAL_PARTS), now, is_first=True)
            if self._part is None:
                self.on_new()
        return share

    def _forget(self, shares: Collection[Share]) -> None:
        for share in shares:
            del self._shares[share.bucket]
        if shares:
            self.epoch += 1


def _part_of(whole: Amount, kind: Kind, part: float) -> Amount:
    """Return a part of a limit: at least one request in flight, and a burst of at least one unit."""
    if kind is Kind.IN_FLIGHT:
        return Amount(max(1, int(whole.amount * part)))
    return Amount(whole.amount * part, max(1.0, whole.burst * part))
