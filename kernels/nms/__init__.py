"""Non-maximum suppression: keep the box with the highest score among overlapping boxes.

    best first:  keep a box  <=>  no kept box of its group has IoU with it above the threshold

    IoU = both / (area a + area b - both)     negative sides of areas and overlaps count as 0

Every step is one float32 operation in this order, so that all versions and torchvision keep the same boxes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="cuda")

MAX_BOXES_ON_GPU = 393_216
"""The sweep keeps a bit for each box in the 48 KiB of memory that its block shares."""


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
    """Return the indices of the kept boxes, highest score first; equal scores by ascending index.

    A box whose score is NaN is dropped. A box with a NaN coordinate or an empty area overlaps nothing and is kept.

    Args:
        boxes: [m, 4] float32, (x1, y1, x2, y2), C-contiguous.
        scores: [m] float32.
        threshold: IoU in [0, 1]; boxes with a larger overlap are suppressed.
        groups: [m] int32, or None. Boxes of different groups never suppress each other. A group is a class, or for a
            batch of images, image * classes + class.
        least_score: boxes with a lower score are dropped.
        out: [l] int64 for the best l kept boxes; a smaller l ends the work earlier. [m] when None.
        stream: the `cupy.cuda.Stream` to run on; None is CuPy's current one. The call does not wait for it.

    Returns:
        On the CPU, a view of the filled part of `out`. On a GPU, all of `out` with -1 behind the last box, because the
        number of kept boxes is unknown without waiting.

    Raises:
        ValueError: a threshold outside [0, 1], a `least_score` that is NaN, a wrong shape or memory order, more than
            `MAX_BOXES_ON_GPU` boxes on a GPU.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    version = OPERATION.version(stream, boxes=boxes, scores=scores, groups=groups, out=out)
    arrays.expect("nms", "boxes", boxes, ("m", 4), arrays.FLOAT32)
    m = boxes.shape[0]
    arrays.expect("nms", "scores", scores, (m,), arrays.FLOAT32)
    if groups is not None:
        arrays.expect("nms", "groups", groups, (m,), arrays.INT32)
    if not 0 <= threshold <= 1:
        raise ValueError(f"nms: threshold must be in [0, 1], not {threshold}")
    if math.isnan(least_score):
        raise ValueError("nms: least_score is NaN")
    if out is None:
        out = arrays.empty(boxes, (m,), arrays.INT64, stream)
    arrays.expect_output("nms", "out", out, ("l",), arrays.INT64)
    return version.run(boxes, scores, groups, _not_above(threshold), _not_below(least_score), out, stream)


def _not_above(value: float) -> np.float32:
    """Return the largest float32 <= value. A float32 is above the result exactly when it is above `value`."""
    near = np.float32(value)
    return np.nextafter(near, np.float32(-np.inf)) if float(near) > value else near


def _not_below(value: float) -> np.float32:
    """Return the smallest float32 >= value."""
    return -_not_above(-value)


def warm_up() -> None:
    """Compile every variant of the chosen backend."""
    boxes, scores = arrays.at_choice(np.zeros((1, 4), np.float32)), arrays.at_choice(np.zeros(1, np.float32))
    nms(boxes, scores, 0.5, groups=arrays.at_choice(np.zeros(1, np.int32)))
