"""Queue rules of a model's configuration: priority levels, timeouts, bounds, tenants, goal.

dynamic_batching                 Triton's, with Triton's meaning: `model_config.proto`
parameters, ours                 slo_ms             complete within so many milliseconds, at the highest throughput
                                 tenant_weights     "gold=4,free=1": shares of tenants that wait together; others have 1
                                 priority_aging_ms  wait that makes up for one priority level; 0: none does
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shoal.inference.v2 import model_config_pb2 as pb

SLO, WEIGHTS, AGING = PARAMETERS = ("slo_ms", "tenant_weights", "priority_aging_ms")
"""Parameters of a configuration that this module reads."""

_MAX_LEVELS = 256
_MAX_MS = 3_600_000
_MAX_WEIGHT = 1_000_000
_MAX_WEIGHTS = 1024

# Far longer than a healthy queue: levels are strict for requests of about the same age, and none waits for ever.
_AGING_MS = 1000.0

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Level:
    """Queue rules of one priority level."""

    timeout_s: float = math.inf
    """Longest wait in the queue."""
    delays: bool = False
    """True: a request that times out is run after the others of its level, instead of rejected."""
    allows_override: bool = True
    """True: a request's own `timeout` counts when it is shorter."""
    calls: int = 0
    """Requests that may wait; 0: the server's own bound."""


@dataclass(frozen=True)
class Rules:
    """Queue rules of one model."""

    levels: tuple[Level, ...] = (Level(),)
    """The first runs first."""
    default_level: int = 0
    """Index of the level of requests that name none."""
    aging_s: float = _AGING_MS / 1000
    """A request that has waited this much longer ranks as one of the next better level; infinite: never."""
    preserves_order: bool = False
    """True: outcomes are delivered in order of arrival."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights by tenant; 1 for tenants without an entry."""

    def level(self, priority: int) -> int:
        """Return the index of a request's level. As in Triton, 0 and unknown levels mean the default."""
        return priority - 1 if 0 < priority <= len(self.levels) else self.default_level


def of(config: pb.ModelConfig) -> Rules:
    """Return the rules of a configuration without findings of `wrong`."""
    batching = config.dynamic_batching
    own = batching.priority_queue_policy
    numbers = range(1, batching.priority_levels + 1) or (1,)
    aging_s = float(_value(config, AGING) or _AGING_MS) / 1000
    return Rules(
        levels=tuple(_level(own.get(n, batching.default_queue_policy)) for n in numbers),
        default_level=max(batching.default_priority_level, 1) - 1,
        aging_s=aging_s or math.inf,
        preserves_order=batching.preserve_ordering,
        weights=dict(_weights(_value(config, WEIGHTS) or "")),
    )


def slo_s(config: pb.ModelConfig) -> float:
    """Return the seconds within which requests should be completed; infinite without a goal."""
    value = _value(config, SLO)
    return math.inf if value is None else float(value) / 1000


def _level(policy: pb.ModelQueuePolicy) -> Level:
    timeout_us = policy.default_timeout_microseconds
    return Level(
        timeout_s=timeout_us / 1e6 if timeout_us else math.inf,
        delays=policy.timeout_action == pb.ModelQueuePolicy.DELAY,
        # Without a timeout of the model there is nothing to override: then the request's own is the only one.
        allows_override=policy.allow_timeout_override or not timeout_us,
        calls=policy.max_queue_size,
    )


def wrong(config: pb.ModelConfig) -> Iterator[str]:
    """Yield every contradiction or range error of the queue's settings, by name."""
    yield from _wrong_levels(config.dynamic_batching)
    yield from _wrong_order(config.dynamic_batching)
    yield from _wrong_parameters(config)


def _wrong_levels(batching: pb.ModelDynamicBatching) -> Iterator[str]:
    levels, default = batching.priority_levels, batching.default_priority_level
    if levels > _MAX_LEVELS:
        yield f"dynamic_batching.priority_levels {levels}: expected 0 to {_MAX_LEVELS}"
    elif levels and not 1 <= default <= levels:
        yield f"dynamic_batching.default_priority_level {default}: expected 1 to priority_levels, {levels}"
    elif not levels and default > 1:
        yield f"dynamic_batching.default_priority_level {default}: there are no priority_levels"
    for number in sorted(batching.priority_queue_policy):
        if not 1 <= number <= levels:
            yield f"dynamic_batching.priority_queue_policy {number}: expected 1 to priority_levels, {levels}"


def _wrong_order(batching: pb.ModelDynamicBatching) -> Iterator[str]:
    if not batching.preserve_ordering:
        return
    if batching.priority_levels > 1:
        yield "dynamic_batching.preserve_ordering allows one priority level only"
    policies = [batching.default_queue_policy, *batching.priority_queue_policy.values()]
    delay = pb.ModelQueuePolicy.DELAY
    if any(policy.timeout_action == delay and policy.default_timeout_microseconds for policy in policies):
        yield "dynamic_batching.preserve_ordering does not go with timeout_action DELAY"


def _wrong_parameters(config: pb.ModelConfig) -> Iterator[str]:
    slo = _value(config, SLO)
    if slo is not None and not (_NUMBER.fullmatch(slo) and 0 < float(slo) <= _MAX_MS):
        yield f"parameter {SLO} '{slo}': expected milliseconds, more than 0 and at most {_MAX_MS}"
    aging = _value(config, AGING)
    if aging is not None and not (_NUMBER.fullmatch(aging) and float(aging) <= _MAX_MS):
        yield f"parameter {AGING} '{aging}': expected milliseconds from 0 (never) to {_MAX_MS}"
    weights = _value(config, WEIGHTS)
    if weights is not None:
        try:
            list(_weights(weights))
        except ValueError as err:
            yield f"parameter {WEIGHTS} '{weights}': {err}"


def _weights(text: str) -> Iterator[tuple[str, float]]:
    seen = set()
    for part in text.split(",") if text.strip() else ():
        # A tenant's own name may have an equals sign; a weight has none.
        tenant, _, weight = (piece.strip() for piece in part.rpartition("="))
        if not tenant or not _NUMBER.fullmatch(weight) or not 0 < float(weight) <= _MAX_WEIGHT:
            raise ValueError(f"expected 'tenant=weight,...' with weights above 0 and at most {_MAX_WEIGHT}")
        if tenant in seen:
            raise ValueError(f"tenant '{tenant}' is there twice")
        seen.add(tenant)
        if len(seen) > _MAX_WEIGHTS:
            raise ValueError(f"expected at most {_MAX_WEIGHTS} tenants")
        yield tenant, float(weight)


def _value(config: pb.ModelConfig, key: str) -> str | None:
    return config.parameters[key].string_value.strip() if key in config.parameters else None
