"""Whether a model's drift is small enough, and in words why not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.convert.drift import Drift


@dataclass(frozen=True)
class Bounds:
    """What is accepted."""

    relative: float = 1e-4
    """Largest relative drift of any element (drift.py says of what). float32 sums of a thousand terms stay below it."""
    flips: int = 0
    """Rows whose label may change, ties aside."""

    def __str__(self) -> str:
        drift = "any relative drift" if self.relative == math.inf else f"a relative drift of {self.relative:g}"
        return f"allowed are {drift} and {self.flips} changed labels"


def refusal(drift: Drift, bounds: Bounds) -> str:
    """Why `drift` is too much; empty when it is not."""
    reasons = [
        f"{output.name} drifts by {output.max_relative:.2g} (relative), allowed is {bounds.relative:g}"
        for output in drift.outputs
        if not output.max_relative <= bounds.relative
    ]
    if drift.flips is not None and drift.flips > bounds.flips:
        reasons.append(f"the label changes in {drift.flips} of {drift.rows} rows, allowed are {bounds.flips}")
    return "; ".join(reasons)
