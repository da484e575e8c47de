"""nms in NumPy, pair by pair: what the other versions must equal. float32, because a decision must round alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ZERO = np.float32(0)


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
        if not any(overlap(boxes[i], boxes[j]) > threshold for j in rivals):
            kept.append(i)
    out[: len(kept)] = kept
    return out[: len(kept)]


def overlap(a: Array, b: Array) -> np.float32:
    """IoU; 0 or NaN where one has no area or a NaN coordinate."""
    if np.isnan(a).any() or np.isnan(b).any():
        return ZERO
    with np.errstate(over="ignore", invalid="ignore"):  # Infinite boxes, and two without an area.
        w, h = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), ZERO)
        both = w * h
        ratio: np.float32 = both / (_area(a) + _area(b) - both)
    return ratio


def _area(box: Array) -> np.float32:
    w, h = np.maximum(box[2:] - box[:2], ZERO)
    area: np.float32 = w * h
    return area
