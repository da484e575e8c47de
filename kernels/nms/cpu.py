"""nms on the CPU: compares each box, best first, with the kept boxes, 16 at a time.

Each coordinate of the kept boxes has its own array, so 16 comparisons are one vector operation. The search ends at the
first 16 boxes that contain a suppressing one. The arrays are padded with boxes that overlap nothing, so that every step
compares 16 boxes; a loop with a scalar remainder was 4 times slower. Score and index of a box are packed into one
integer, because NumPy's integer sort is vectorised.
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
    """Write a sort key for each box with a score >= `least`, and return their number.

    Ascending keys order the boxes by descending score, equal scores by ascending index.
    """
    count = 0
    for i in range(scores.size):
        # False for NaN.
        if scores[i] >= least:
            sign = bits[i] >> np.int32(31)
            # Integers in the order of the floats; both zeros are equal.
            key = np.int64(((bits[i] & MAGNITUDE) ^ sign) - sign)
            out[count] = np.uint64(np.int64(MAGNITUDE) - key) << np.uint64(32) | np.uint64(i)
            count += 1
    return count


@njit(nogil=True, cache=True)
def side_of(low, high):
    side = high - low
    return side if side > ZERO else ZERO


@njit(nogil=True, cache=True)
def area_of(x1, y1, x2, y2):
    """Return the area of a box; NaN when a coordinate is NaN. A NaN area makes every IoU NaN, and no box suppressed."""
    if x1 != x1 or y1 != y1 or x2 != x2 or y2 != y2:
        return NAN
    return side_of(x1, x2) * side_of(y1, y2)


@njit(nogil=True, cache=True, error_model="numpy")
def any_suppresses(first, kept, group_of, box, area, group, threshold):
    """Return True when one of 16 kept boxes suppresses the box. The loop is vectorised: no branch, constant length."""
    x1, y1, x2, y2 = box
    found = np.int32(0)
    for j in range(TOGETHER):
        # An unsigned index needs no check for negative values.
        at = first + np.uint64(j)
        w = side_of(max(x1, kept[0, at]), min(x2, kept[2, at]))
        h = side_of(max(y1, kept[1, at]), min(y2, kept[3, at]))
        both = w * h
        found |= np.int32((both / (area + kept[4, at] - both) > threshold) & (group_of[at] == group))
    return found != 0


@njit(nogil=True, cache=True)
def suppress(order, boxes, groups, threshold, out):
    """Write the indices of the kept boxes, and return their number."""
    most = min(order.size, out.size)
    # Corners and areas. The padding is NaN, which overlaps nothing.
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
