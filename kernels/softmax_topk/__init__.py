"""Softmax and top k: the k most probable classes of each row of logits, with their probabilities.

    probability[i] = exp(x[i] - max(x)) / sum_j exp(x[j] - max(x))

Only k probabilities of a row are written, never the whole row.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="cuda")


def softmax_topk(logits: Any, k: int, *, out: tuple[Any, Any] | None = None, stream: Any = None) -> tuple[Any, Any]:
    """Return the k largest probabilities of each row and their indices.

    Order: larger logits first; equal logits by ascending index; NaN after every number. A row that contains NaN or
    +inf, or only -inf, has no softmax: its probabilities are all NaN, as in `torch.softmax`, and its indices are in the
    order above. A probability below 2**-126 may be 0.

    Args:
        logits: [n, m] float32 or float16, C-contiguous. On the CPU float16 is copied to float32 first.
        k: 1 or more; more than m means m. A GPU reads a row once for each of the k, so k should be in the tens.
        out: probabilities, float32, and indices, int64, both [n, min(k, m)]; allocated when None.
        stream: the `cupy.cuda.Stream` to run on; None is CuPy's current one. The call does not wait for it.

    Returns:
        probabilities and indices: `out`.

    Raises:
        ValueError: k below 1, a wrong shape or memory order.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    k = operator.index(k)
    if k < 1:
        raise ValueError(f"softmax_topk: k must be 1 or more, not {k}")
    probabilities: Any
    indices: Any
    probabilities, indices = out or (None, None)
    version = OPERATION.version(stream, logits=logits, probabilities=probabilities, indices=indices)
    arrays.expect("softmax_topk", "logits", logits, ("n", "m"), arrays.FLOAT32, arrays.FLOAT16)
    shape = (logits.shape[0], min(k, logits.shape[1]))
    if out is None:
        probabilities = arrays.empty(logits, shape, arrays.FLOAT32, stream)
        indices = arrays.empty(logits, shape, arrays.INT64, stream)
    arrays.expect_output("softmax_topk", "out[0]", probabilities, shape, arrays.FLOAT32)
    arrays.expect_output("softmax_topk", "out[1]", indices, shape, arrays.INT64)
    if probabilities.size:
        version.run(logits, probabilities, indices, stream)
    return probabilities, indices


def warm_up() -> None:
    """Compile every variant of the chosen backend."""
    for dtype in (np.float32, np.float16):
        softmax_topk(arrays.at_choice(np.zeros((1, 2), dtype)), 1)
