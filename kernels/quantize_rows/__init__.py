"""Rows of float32 as int8 and one scale each: a quarter of the bytes to store and to send.

    m = max |x|     scale = m / 127     q = round(x * (127 / m))     x ~ q * scale, at most about scale / 2 off

Every step is one float32 operation, rounded to nearest even, so that all versions give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="numba_cuda")


def quantize_rows(x: Any, *, out: tuple[Any, Any] | None = None, stream: Any = None) -> tuple[Any, Any]:
    """Each row as int8 in [-127, 127], and its scale.

    A row that holds NaN or an infinity cannot be scaled: its scale is NaN and its numbers are 0, so that it comes back
    as NaN and not as something plausible. A row whose largest magnitude is below 1.5e-36 (127 times the smallest
    normal float32), zeros included, is all 0 with scale 0.

    Args:
        x: [n, m] float32, C-contiguous.
        out: numbers, int8 [n, m], and scales, float32 [n]; allocated when None.
        stream: the `cupy.cuda.Stream` to run on, CuPy's current one when None. Nothing waits for it.

    Returns:
        numbers and scales: `out`.

    Raises:
        ValueError: a wrong shape or order of memory.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    numbers, scales = out or (None, None)
    version = OPERATION.version(stream, x=x, numbers=numbers, scales=scales)
    arrays.expect("quantize_rows", "x", x, ("n", "m"), "float32")
    if out is None:
        numbers = arrays.empty(x, x.shape, "int8", stream)
        scales = arrays.empty(x, x.shape[:1], "float32", stream)
    arrays.expect_output("quantize_rows", "out[0]", numbers, x.shape, "int8")
    arrays.expect_output("quantize_rows", "out[1]", scales, x.shape[:1], "float32")
    version.quantize(x, numbers, scales, stream)
    return numbers, scales


def dequantize_rows(numbers: Any, scales: Any, *, out: Any = None, stream: Any = None) -> Any:
    """numbers * scales, row by row: what `quantize_rows` was given, nearly.

    Args:
        numbers: [n, m] int8, C-contiguous.
        scales: [n] float32.
        out: [n, m] float32; allocated when None.
        stream: as in `quantize_rows`.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: as `quantize_rows`.
    """
    version = OPERATION.version(stream, numbers=numbers, scales=scales, out=out)
    arrays.expect("dequantize_rows", "numbers", numbers, ("n", "m"), "int8")
    arrays.expect("dequantize_rows", "scales", scales, numbers.shape[:1], "float32")
    if out is None:
        out = arrays.empty(numbers, numbers.shape, "float32", stream)
    arrays.expect_output("dequantize_rows", "out", out, numbers.shape, "float32")
    version.dequantize(numbers, scales, out, stream)
    return out


def warm_up() -> None:
    """Compiles what a call would compile."""
    dequantize_rows(*quantize_rows(arrays.at_choice(np.zeros((1, 1), np.float32))))
