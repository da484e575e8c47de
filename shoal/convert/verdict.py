"""Acceptance of a model's drift, and the reasons of a refusal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.convert.drift import Drift


@dataclass(frozen=True)
class Bounds:
    """Limits of the accepted drift."""

    relative: float = 1e-4
    """Largest relative drift of an element (see drift.py). float32 sums of a thousand terms stay below the default."""
    flips: int = 0
    """Number of rows whose label may change, without ties."""
    share: float | None = None
    """Share of the rows whose label may change; replaces `flips`."""

    def flips_of(self, rows: int) -> int:
        """Return the number of rows, out of `rows`, whose label may change."""
        return self.flips if self.share is None else int(self.share * rows)

    def __str__(self) -> str:
        drift = "any relative drift" if self.relative == math.inf else f"a relative drift of {self.relative:g}"
        labels = (
            f"{self.flips} changed labels" if self.share is None else f"{100 * self.share:.3g}% of the labels changed"
        )
        return f"allowed are {drift} and {'any label changed' if self.share == 1.0 else labels}"


def refusal(drift: Drift, bounds: Bounds) -> str:
    """Return the reasons why `drift` exceeds `bounds`; empty when it does not."""
    reasons = [
        f"{output.name} drifts by {output.max_relative:.2g} (relative), allowed is {bounds.relative:g}"
        for output in drift.outputs
        if not output.max_relative <= bounds.relative
    ]
    allowed = bounds.flips_of(drift.rows)
    if drift.flips is not None and drift.flips > allowed:
        reasons.append(f"the label changes in {drift.flips} of {drift.rows} rows, allowed are {allowed}")
    return "; ".join(reasons)
