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
    share: float | None = None
    """The same as a share of the rows, in place of `flips`."""

    def flips_of(self, rows: int) -> int:
        """How many of `rows` may change."""
        return self.flips if self.share is None else int(self.share * rows)

    def __str__(self) -> str:
        drift = "any relative drift" if self.relative == math.inf else f"a relative drift of {self.relative:g}"
        labels = (
            f"{self.flips} changed labels" if self.share is None else f"{100 * self.share:.3g}% of the labels changed"
        )
        return f"allowed are {drift} and {'any label changed' if self.share == 1.0 else labels}"


def refusal(drift: Drift, bounds: Bounds) -> str:
    """Why `drift` is too much; empty when it is not."""
    reasons = [
        f"{output.name} drifts by {output.max_relative:.2g} (relative), allowed is {bounds.relative:g}"
        for output in drift.outputs
        if not output.max_relative <= bounds.relative
    ]
    allowed = bounds.flips_of(drift.rows)
    if drift.flips is not None and drift.flips > allowed:
        reasons.append(f"the label changes in {drift.flips} of {drift.rows} rows, allowed are {allowed}")
    return "; ".join(reasons)
