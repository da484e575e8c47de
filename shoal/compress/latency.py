"""Latency of two models in interleaved calls, so that other load on the machine affects both alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from shoal.convert.onnx_model import OnnxModel
from shoal.convert.original import Tensors

# Numbers of rounds: not counted, and the least and most counted.
WARM_UP, FEWEST, MOST = 3, 15, 400
# Time for one batch size. Rounds end after it, once there are FEWEST.
BUDGET_S = 1.5


@dataclass(frozen=True)
class Latency:
    """Median latencies of one call, over all rounds."""

    rows: int
    rounds: int
    original_ms: float
    compressed_ms: float
    speedup: float
    """Median of the rounds' ratios; above 1 when the compressed model is faster."""


def compare(original: OnnxModel, compressed: OnnxModel, call: Tensors, rows: int) -> Latency:
    """Time both models on `call`, which has `rows` rows."""
    pairs: list[tuple[float, float]] = []
    until = time.perf_counter() + BUDGET_S
    for n in range(WARM_UP + MOST):
        # The order alternates; otherwise the second model would always have warmer caches.
        first, second = (original, compressed) if n % 2 == 0 else (compressed, original)
        a, b = _timed(lambda first=first: first.predict(call)), _timed(lambda second=second: second.predict(call))  # type: ignore[misc]
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
