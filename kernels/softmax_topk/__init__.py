"""The k likeliest classes of each row of logits, with their probabilities.

    probability[i] = exp(x[i] - max(x)) / sum_j exp(x[j] - max(x))

The whole row is never written: only k numbers of it leave.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="cuda")


def softmax_topk(logits: Any, k: int, *, out: tuple[Any, Any] | None = None, stream: Any = None) -> tuple[Any, Any]:
    """The k largest probabilities of each row and where they are.

    Order: larger logits first; equal ones by index, lower first; NaN after every number. A row that holds NaN or +inf,
    or nothing but -inf, has no softmax: its probabilities are all NaN, as `torch.softmax` has it, and its indices are
    in the order above. A probability below 2**-126 may be 0.

    Args:
        logits: [n, m] float32 or float16, C-contiguous. On the CPU float16 is copied to float32 first.
        k: 1 or more; more than m means m. On a GPU a row is gone over once for each of the k: meant for tens.
        out: probabilities, float32, and indices, int64, both [n, min(k, m)]; allocated when None.
        stream: the `cupy.cuda.Stream` to run on, CuPy's current one when None. Nothing waits for it.

    Returns:
        probabilities and indices: `out`.

    Raises:
        ValueError: k below 1, a wrong shape or order of memory.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    k = operator.index(k)
    if k < 1:
        raise ValueError(f"softmax_topk: k must be 1 or more, not {k}")
    probabilities: Any
    indices: Any
    probabilities, indices = out or (None, None)
    version = OPERATION.version(stream, logits=logits, probabilities=probabilities, indices=indices)
    arrays.expect("softmax_topk", "logits", logits, ("n", "m"), "float32", "float16")
    shape = (logits.shape[0], min(k, logits.shape[1]))
    if out is None:
        probabilities = arrays.empty(logits, shape, "float32", stream)
        indices = arrays.empty(logits, shape, "int64", stream)
    arrays.expect_output("softmax_topk", "out[0]", probabilities, shape, "float32")
    arrays.expect_output("softmax_topk", "out[1]", indices, shape, "int64")
    if probabilities.size:
        version.run(logits, probabilities, indices, stream)
    return probabilities, indices


def warm_up() -> None:
    """Compiles what a call would compile."""
    for dtype in (np.float32, np.float16):
        softmax_topk(arrays.at_choice(np.zeros((1, 2), dtype)), 1)
