"""How long two models take, side by side: a call of one, a call of the other, again and again, so that whatever else
the machine does meets both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from shoal.convert.onnx_model import OnnxModel
from shoal.convert.original import Tensors

WARM_UP, FEWEST, MOST = 3, 15, 400
"""Rounds that are not counted, and those that are."""
BUDGET_S = 1.5
"""For one batch size: rounds end then, when there are enough."""


@dataclass(frozen=True)
class Latency:
    """Medians over the rounds, of one call."""

    rows: int
    rounds: int
    original_ms: float
    compressed_ms: float
    speedup: float
    """Median of each round's own ratio: above 1, the compressed one is faster."""


def compare(original: OnnxModel, compressed: OnnxModel, call: Tensors, rows: int) -> Latency:
    """Times both on `call`, which has `rows` rows."""
    pairs: list[tuple[float, float]] = []
    until = time.perf_counter() + BUDGET_S
    for n in range(WARM_UP + MOST):
        # The order changes, or the second would always find warmer caches.
        first, second = (original, compressed) if n % 2 == 0 else (compressed, original)
        a, b = _timed(lambda first=first: first.answer(call)), _timed(lambda second=second: second.answer(call))  # type: ignore[misc]
        if n >= WARM_UP:
            pairs.append((a, b) if n % 2 == 0 else (b, a))
        if len(pairs) >= FEWEST and time.perf_counter() > until:
            break
    return Latency(
        rows,
        len(pairs),
        1e3 * median(a for a, _ in pairs),
        1e3 * median(b for _, b in pairs),
        median(a / b for a, b in pairs),
    )


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
