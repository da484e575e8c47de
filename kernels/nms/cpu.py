"""nms on the CPU: each box, best first, is compared with those kept so far, 16 at a time.

The kept boxes' coordinates lie each in an array of its own, so that 16 comparisons are one vector's; the first 16 among
which one suppresses the box end it. Always 16: behind the last kept box are some that overlap nothing. With a loop that
ends at the last one, box by box in its end, it was 4 times slower. NumPy brings the boxes into order: a score and its
index make one whole number, and its sort of those is a vector's too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels.arrays import frozen

Array = npt.NDArray[Any]

TOGETHER = 16
INDEX = np.uint64(0xFFFFFFFF)
MAGNITUDE = np.int32(0x7FFFFFFF)
ZERO, NAN = np.float32(0), np.float32(np.nan)
NO_GROUPS = frozen(np.empty(0, np.int32))


@njit(nogil=True, cache=True)
def order_of(scores, bits, least, out):
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
def side_of(low, high):
    side = high - low
    return side if side > ZERO else ZERO


@njit(nogil=True, cache=True)
def area_of(x1, y1, x2, y2):
    """NaN with any coordinate: it makes every IoU NaN, which is above nothing."""
    if x1 != x1 or y1 != y1 or x2 != x2 or y2 != y2:
        return NAN
    return side_of(x1, x2) * side_of(y1, y2)


@njit(nogil=True, cache=True, error_model="numpy")
def any_suppresses(first, kept, group_of, box, area, group, threshold):
    """Whether one of 16 kept boxes suppresses the box. No branch, and a constant length: one vector."""
    x1, y1, x2, y2 = box
    found = np.int32(0)
    for j in range(TOGETHER):
        at = first + np.uint64(j)  # Unsigned: no index counts from the end.
        w = side_of(max(x1, kept[0, at]), min(x2, kept[2, at]))
        h = side_of(max(y1, kept[1, at]), min(y2, kept[3, at]))
        both = w * h
        found |= np.int32((both / (area + kept[4, at] - both) > threshold) & (group_of[at] == group))
    return found != 0


@njit(nogil=True, cache=True)
def suppress(order, boxes, groups, threshold, out):
    """Writes the kept boxes' indices; returns how many."""
    most = min(order.size, out.size)
    # Corners and areas. A box of NaN overlaps nothing.
    kept = np.full((5, most + TOGETHER), NAN, np.float32)
    group_of = np.zeros(most + TOGETHER, np.int32)
    count = 0
    for number in order:
        if count == most:
            break
        at = number & INDEX
        box = (boxes[at, 0], boxes[at, 1], boxes[at, 2], boxes[at, 3])
        area = area_of(*box)
        group = groups[at] if groups.size else np.int32(0)
        suppressed = False
        for first in range(0, count, TOGETHER):
            if any_suppresses(np.uint64(first), kept, group_of, box, area, group, threshold):
                suppressed = True
                break
        if not suppressed:
            kept[0, count], kept[1, count], kept[2, count], kept[3, count] = box
            kept[4, count], group_of[count], out[count] = area, group, at
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
    boxes, scores = frozen(boxes), frozen(scores)
    order = np.empty(scores.size, np.uint64)
    order = order[: order_of(scores, scores.view(np.int32), least, order)]
    order.sort()
    return out[: suppress(order, boxes, NO_GROUPS if groups is None else frozen(groups), threshold, out)]
