"""Division of limits among those who count calls: gateways (requests a second) and service instances (the rest).

    claims (bucket, demand) ──divide──> shares that sum to at most the limit, until the next claim

A claimant keeps its share until its next claim, or until the share expires. So a newcomer's share comes on top of the
others' until these claim again: together at most twice a limit, for one interval of claims. A coord knows only the
shares that it has handed out itself, and what claimants say. So a claimant that has a share of a former leader keeps at
most that with its first claim: until all have claimed here, none of them grows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from shoal.access.limits import Amount, Bucket, Kind, amount_of
from shoal.access.policy import Limit

RENEW_S = 1.0
"""Interval of claims. An idle claimant's share reaches the others after it."""
LIFETIME_S = 10.0
"""Life of a share without a new claim."""
CLAIMS = 10_000
"""Buckets of one claimant. Each takes about 0.5 kB, and 5 us of each claim."""
STEP = 200
"""Buckets that are divided in one iteration of the event loop."""
_IDLE_PART = 0.1
"""Part of an equal share that a claimant without demand keeps: its first calls are not refused."""


def divide(amount: float, demands: Sequence[float], *, is_whole: bool = False) -> list[float]:
    """Return shares for `demands`, which sum to at most `amount`.

    Demands are met as far as all claimants get an equal share (max-min fairness). What is left is divided equally. With
    `is_whole`, shares are whole numbers.
    """
    if len(demands) < 2:
        return [amount] * len(demands)
    part = amount / len(demands)
    wanted = [max(demand, part * _IDLE_PART) for demand in demands]
    shares = [0.0] * len(demands)
    left = amount
    # The least demand first: what it leaves belongs to the others.
    for place, index in enumerate(sorted(range(len(demands)), key=wanted.__getitem__)):
        shares[index] = min(wanted[index], left / (len(demands) - place))
        left -= shares[index]
    shares = [share + max(left, 0.0) / len(demands) for share in shares]
    return _rounded(amount, shares, wanted) if is_whole else shares


def _rounded(amount: float, shares: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Round shares down, and give what that leaves to the claimants that lack most."""
    # A sum of floats may be a hair below the whole number.
    rounded = [math.floor(share + 1e-9) for share in shares]
    left = int(amount) - sum(rounded)
    for index in sorted(range(len(shares)), key=lambda index: rounded[index] - wanted[index])[:left]:
        rounded[index] += 1
    return [float(share) for share in rounded]


@dataclass
class _Holding:
    """A share of one claimant."""

    demand: float
    share: float


class Shares:
    """Shares of all buckets. `now` is a monotonic time in seconds."""

    def __init__(self) -> None:
        self._limits: Mapping[str, Limit] = {}
        self._holdings: dict[Bucket, dict[str, _Holding]] = {}
        # Buckets of the last claim of each claimant, and the time when their shares expire.
        self._claims: dict[str, tuple[frozenset[Bucket], float]] = {}

    def set_limits(self, limits: Iterable[Limit]) -> None:
        """Replace the limits. Shares follow with the next claims."""
        self._limits = {limit.name: limit for limit in limits}

    def claim(
        self,
        claimant: str,
        demands: Mapping[Bucket, float],
        now: float,
        held: Mapping[Bucket, float] = MappingProxyType({}),
    ) -> dict[Bucket, Amount]:
        """Return the shares of a claimant, which replace its former ones. `held`: those that it has, of any coord.

        A bucket that is not among `demands` is released. A bucket whose limit the policy does not have gets no share.
        A claimant without a share of a bucket gets its part at once, whatever its demand; a share grows as far as the
        others leave room.
        """
        return {bucket: share for step in self.claim_in_steps(claimant, demands, now, held) for bucket, share in step}

    def claim_in_steps(
        self, claimant: str, demands: Mapping[Bucket, float], now: float, held: Mapping[Bucket, float]
    ) -> Iterator[list[tuple[Bucket, Amount]]]:
        """Yield the shares of `claim` in steps of at most STEP buckets."""
        for name in [name for name, (_, expires_at) in self._claims.items() if expires_at <= now]:
            self.leave(name)
        before, _ = self._claims.get(claimant, (frozenset[Bucket](), 0.0))
        for bucket in before - demands.keys():
            self._release(claimant, bucket)
        claim = self._claims[claimant] = frozenset(demands), now + LIFETIME_S
        wanted = iter(demands.items())
        while step := list(itertools.islice(wanted, STEP)):
            # It may have left or claimed again meanwhile: a share that its last claim does not have is never released.
            if self._claims.get(claimant) is not claim:
                return
            shares = ((each, self._share(claimant, each, demand, held.get(each, 0.0))) for each, demand in step)
            yield [(bucket, share) for bucket, share in shares if share is not None]

    def leave(self, claimant: str) -> None:
        """Release all shares of a claimant."""
        buckets, _ = self._claims.pop(claimant, (frozenset[Bucket](), 0.0))
        for bucket in buckets:
            self._release(claimant, bucket)

    def _share(self, claimant: str, bucket: Bucket, demand: float, held: float) -> Amount | None:
        limit = self._limits.get(bucket.limit)
        whole = None if limit is None else amount_of(limit, bucket.kind)
        if whole is None:
            self._release(claimant, bucket)
            return None
        holdings = self._holdings.setdefault(bucket, {})
        is_new = claimant not in holdings
        # The demand of a newcomer is not known yet, unless it has a share of another coord.
        holding = holdings.setdefault(claimant, _Holding(demand if held else math.inf, 0.0))
        if not is_new:
            holding.demand = demand
        is_whole = bucket.kind is Kind.IN_FLIGHT
        parts = divide(whole.amount, [each.demand for each in holdings.values()], is_whole=is_whole)
        part = parts[list(holdings).index(claimant)]
        others = sum(each.share for each in holdings.values()) - holding.share
        room = whole.amount - others
        if is_new:
            # Half of what is left of twice the limit: further newcomers of the same interval get a share, too.
            room = (room + whole.amount) / 2
            room = min(room, held) if held else room
        holding.share = min(part, max(math.floor(room) if is_whole else room, holding.share))
        return Amount(holding.share, 0.0 if is_whole else whole.burst * holding.share / whole.amount)

    def _release(self, claimant: str, bucket: Bucket) -> None:
        holdings = self._holdings.get(bucket)
        if holdings is None:
            return
        holdings.pop(claimant, None)
        if not holdings:
            del self._holdings[bucket]
