"""nms on the CPU: each box, best first, is compared with those kept so far, 16 or 8 at a time.

The kept boxes' coordinates lie each in an array of its own, so that the comparison is a vector's. It ends with the
first 64 kept boxes among which one suppresses the box. NumPy brings the boxes into order: a score and its index make
one whole number, and its sort of those is a vector's too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

STRETCH = 64
INDEX = np.uint64(0xFFFFFFFF)
MAGNITUDE = np.int32(0x7FFFFFFF)
ZERO, NAN = np.float32(0), np.float32(np.nan)
NO_GROUPS = np.empty(0, np.int32)


@njit(nogil=True, cache=True)
def order_of(scores: Any, bits: Any, least: Any, out: Any) -> int:
    """Writes a number for each box that has at least `least`: it sorts higher scores first, equal ones by index."""
    count = 0
    for i in range(scores.size):
        if scores[i] >= least:  # NaN has not.
            sign = bits[i] >> np.int32(31)
            key = np.int64(((bits[i] & MAGNITUDE) ^ sign) - sign)  # In the order of floats, both zeros equal.
            out[count] = np.uint64(np.int64(MAGNITUDE) - key) << np.uint64(32) | np.uint64(i)
            count += 1
    return count


@njit(nogil=True, cache=True)
def _side(low: Any, high: Any) -> Any:
    side = high - low
    return side if side > ZERO else ZERO


@njit(nogil=True, cache=True)
def _area(x1: Any, y1: Any, x2: Any, y2: Any) -> Any:
    """NaN with any coordinate: it makes every IoU NaN, which is above nothing."""
    if x1 != x1 or y1 != y1 or x2 != x2 or y2 != y2:
        return NAN
    return _side(x1, x2) * _side(y1, y2)


@njit(nogil=True, cache=True, error_model="numpy")
def _suppressed(box: Any, area: Any, group: Any, threshold: Any, corners: Any, areas: Any, groups: Any) -> Any:
    """Whether one of these kept boxes, corners [4, k], suppresses the box. No branch: the loop is a vector's."""
    x1, y1, x2, y2 = box
    left, top, right, bottom = corners
    found = np.int32(0)
    for j in range(areas.size):
        w = _side(max(x1, left[j]), min(x2, right[j]))
        h = _side(max(y1, top[j]), min(y2, bottom[j]))
        both = w * h
        found |= np.int32((both / (area + areas[j] - both) > threshold) & (groups[j] == group))
    return found != 0


@njit(nogil=True, cache=True)
def suppress(order: Any, boxes: Any, groups: Any, threshold: Any, out: Any) -> int:
    """Writes the kept boxes' indices; returns how many."""
    most = min(order.size, out.size)
    corners, areas, group_of = np.empty((4, most), np.float32), np.empty(most, np.float32), np.zeros(most, np.int32)
    count = 0
    for number in order:
        if count == most:
            break
        at = number & INDEX
        box = (boxes[at, 0], boxes[at, 1], boxes[at, 2], boxes[at, 3])
        area = _area(*box)
        group = groups[at] if groups.size else np.int32(0)
        suppressed = False
        for begin in range(0, count, STRETCH):
            end = min(begin + STRETCH, count)
            kept = corners[0, begin:end], corners[1, begin:end], corners[2, begin:end], corners[3, begin:end]
            if _suppressed(box, area, group, threshold, kept, areas[begin:end], group_of[begin:end]):
                suppressed = True
                break
        if not suppressed:
            for c in range(4):
                corners[c, count] = box[c]
            areas[count], group_of[count], out[count] = area, group, at
            count += 1
    return count


def run(
    boxes: Array,
    scores: Array,
    groups: Array | None,
    threshold: np.float32,
    least: np.float32,
    out: Array,
    stream: None = None,
) -> Array:
    order = np.empty(scores.size, np.uint64)
    order = order[: order_of(scores, scores.view(np.int32), least, order)]
    order.sort()
    return out[: suppress(order, boxes, NO_GROUPS if groups is None else groups, threshold, out)]
