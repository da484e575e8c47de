"""Non-maximum suppression: of boxes that overlap, the one with the highest score.

    best first:  keep a box  <=>  no kept box of its group has IoU with it above the threshold

    IoU = both / (area a + area b - both)     areas and overlaps with no negative side

Every step is one float32 operation in this order, so that all versions, and torchvision, take the same decision.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="cuda")


def nms(
    boxes: Any,
    scores: Any,
    threshold: float,
    *,
    groups: Any = None,
    least_score: float = -math.inf,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Indices of the kept boxes, highest score first; equal scores by index, lower first.

    A box whose score is NaN is dropped. A box with a NaN coordinate, or without an area, overlaps nothing: it is kept.

    Args:
        boxes: [m, 4] float32, (x1, y1, x2, y2), C-contiguous.
        scores: [m] float32.
        threshold: IoU in [0, 1]; what is above it is suppressed.
        groups: [m] int32, or None. Boxes of different groups never suppress each other: classes, or for a batch of
            images image * classes + class.
        least_score: boxes below it are dropped.
        out: [l] int64: where the best l kept boxes are written, which also ends the work early. [m] when None.
        stream: the `cupy.cuda.Stream` to run on, CuPy's current one when None. Nothing waits for it.

    Returns:
        On the CPU a view of `out`, as long as there are kept boxes. On a GPU, where their number is not known without
        waiting, all of `out`, -1 behind the last.

    Raises:
        ValueError: a threshold outside of [0, 1], a `least_score` that is NaN, a wrong shape or order of memory.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    version = OPERATION.version(stream, boxes=boxes, scores=scores, groups=groups, out=out)
    arrays.expect("nms", "boxes", boxes, ("m", 4), "float32")
    m = boxes.shape[0]
    arrays.expect("nms", "scores", scores, (m,), "float32")
    if groups is not None:
        arrays.expect("nms", "groups", groups, (m,), "int32")
    if not 0 <= threshold <= 1:
        raise ValueError(f"nms: threshold must be in [0, 1], not {threshold}")
    if math.isnan(least_score):
        raise ValueError("nms: least_score is NaN")
    if out is None:
        out = arrays.empty(boxes, (m,), "int64", stream)
    arrays.expect_output("nms", "out", out, ("l",), "int64")
    return version.run(boxes, scores, groups, _not_above(threshold), _not_below(least_score), out, stream)


def _not_above(value: float) -> np.float32:
    """The largest float32 <= value: a float32 is above it exactly when it is above `value`."""
    near = np.float32(value)
    return np.nextafter(near, np.float32(-np.inf)) if float(near) > value else near


def _not_below(value: float) -> np.float32:
    """The smallest float32 >= value."""
    return -_not_above(-value)


def warm_up() -> None:
    """Compiles what a call would compile."""
    boxes, scores = arrays.at_choice(np.zeros((1, 4), np.float32)), arrays.at_choice(np.zeros(1, np.float32))
    nms(boxes, scores, 0.5, groups=arrays.at_choice(np.zeros(1, np.int32)))
