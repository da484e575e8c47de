"""Reference version of nms in NumPy, box by box. float32, so that every comparison rounds as in the other versions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ZERO, NAN = np.float32(0), np.float32(np.nan)


def run(
    boxes: Array,
    scores: Array,
    groups: Array | None,
    threshold: np.float32,
    least: np.float32,
    out: Array,
    stream: None = None,
) -> Array:
    order = sorted(np.flatnonzero(scores >= least).tolist(), key=lambda i: (-scores[i], i))
    kept: list[int] = []
    for i in order:
        if len(kept) == out.size:
            break
        rivals = [j for j in kept if groups is None or groups[i] == groups[j]]
        if not (overlaps(boxes[i], boxes[rivals]) > threshold).any():
            kept.append(i)
    out[: len(kept)] = kept
    return out[: len(kept)]


def overlaps(box: Array, others: Array) -> Array:
    """Return the IoU of `box` with each of `others`; NaN for a NaN coordinate, and for two empty boxes."""
    # Infinite boxes overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        sides = np.maximum(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), ZERO)
        both = sides[:, 0] * sides[:, 1]
        ratios: Array = both / (_areas(box[None]) + _areas(others) - both)
    return ratios


def _areas(boxes: Array) -> Array:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], ZERO)
    areas: Array = np.where(np.isnan(boxes).any(axis=1), NAN, sides[:, 0] * sides[:, 1])
    return areas
