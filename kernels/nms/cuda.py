"""nms on a GPU, in three launches: order, who suppresses whom (a matrix of bits), one block that goes through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kernels import arrays
from kernels.cuda_source import CudaSource

SOURCE = CudaSource(Path(__file__).with_name("nms.cu"), ("nms_order", "nms_matrix", "nms_sweep"), registers=48)
WORD = 64
THREADS = 256


def run(
    boxes: Any, scores: Any, groups: Any, threshold: np.float32, least: np.float32, out: Any, stream: Any = None
) -> Any:
    """Takes m * m / 8 bytes, and 28 m more, from the stream's memory pool for as long as the kernels run."""
    m = boxes.shape[0]
    words = -(-m // WORD)
    corners = arrays.empty(boxes, (m, 4), "float32", stream)
    group_of, index, count = (arrays.empty(boxes, (size,), "int32", stream) for size in (m, m, 1))
    matrix = arrays.empty(boxes, (m, words), "uint64", stream)
    size = np.int32(m)
    if m:
        # A kernel takes no "no array": the scores stand in for groups that nobody reads.
        grouped = (scores.view(np.int32), np.int32(0)) if groups is None else (groups, np.int32(1))
        order = (boxes, scores, *grouped, least, size, corners, group_of, index, count)
        SOURCE.launch("nms_order", (-(-m // THREADS), 1, 1), (THREADS, 1, 1), order, 0, stream)
        pairs = (corners, group_of, count, threshold, size, matrix)
        SOURCE.launch("nms_matrix", (words, words, 1), (WORD, 1, 1), pairs, 0, stream)
    sweep = (matrix, index, count, size, out, np.int32(out.size))
    SOURCE.launch("nms_sweep", (1, 1, 1), (THREADS, 1, 1), sweep, 8 * words, stream)
    return out
