"""nms on a GPU, in three launches: sort, bit matrix of suppressing pairs, and one block that sweeps the matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kernels import arrays
from kernels.cuda_source import CudaSource
from kernels.nms import MAX_BOXES_ON_GPU

SOURCE = CudaSource(Path(__file__).with_name("nms.cu"), ("nms_order", "nms_matrix", "nms_sweep"), registers=48)
WORD = 64
THREADS = 256


def run(
    boxes: Any, scores: Any, groups: Any, threshold: np.float32, least: np.float32, out: Any, stream: Any = None
) -> Any:
    """Run the three kernels with m * m / 8 + 28 m bytes of scratch from the stream's memory pool."""
    m = boxes.shape[0]
    if m > MAX_BOXES_ON_GPU:
        raise ValueError(f"nms: {m} boxes, more than {MAX_BOXES_ON_GPU} on a GPU")
    words = -(-m // WORD)
    corners = arrays.empty(boxes, (m, 4), arrays.FLOAT32, stream)
    group_of, index, count = (arrays.empty(boxes, (size,), arrays.INT32, stream) for size in (m, m, 1))
    matrix = arrays.empty(boxes, (m, words), np.dtype(np.uint64), stream)
    size = np.int32(m)
    if m:
        # A kernel argument cannot be None: without groups, pass the scores, which the kernel does not read as groups.
        grouped = (scores.view(np.int32), np.int32(0)) if groups is None else (groups, np.int32(1))
        order = (boxes, scores, *grouped, least, size, corners, group_of, index, count)
        SOURCE.launch("nms_order", (-(-m // THREADS), 1, 1), (THREADS, 1, 1), order, 0, stream)
        pairs = (corners, group_of, count, threshold, size, matrix)
        SOURCE.launch("nms_matrix", (words, words, 1), (WORD, 1, 1), pairs, 0, stream)
    sweep = (matrix, index, count, size, out, np.int32(out.size))
    SOURCE.launch("nms_sweep", (1, 1, 1), (THREADS, 1, 1), sweep, 8 * words, stream)
    return out
