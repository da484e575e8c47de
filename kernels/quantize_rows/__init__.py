"""Quantization of float32 rows to int8 with one scale per row: a quarter of the bytes to store and to send.

    scale = max |x| / 127     q = round(x / scale)     x ~ q * scale, with an error of about scale / 2 at most

Every step is one float32 operation, rounded to nearest even. All versions give the same bits as NumPy for this formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="numba_cuda")


def quantize_rows(x: Any, *, out: tuple[Any, Any] | None = None, stream: Any = None) -> tuple[Any, Any]:
    """Return each row as int8 in [-127, 127], with its scale.

    A row with NaN or an infinity has the scale NaN and the numbers 0, so `dequantize_rows` returns NaN instead of
    plausible values. A row whose largest magnitude is below 1.5e-36 (127 times the smallest normal float32) has the
    scale 0 and the numbers 0.

    Args:
        x: [n, m] float32, C-contiguous.
        out: numbers, int8 [n, m], and scales, float32 [n]; allocated when None.
        stream: the `cupy.cuda.Stream` to run on; None is CuPy's current one. The call does not wait for it.

    Returns:
        numbers and scales: `out`.

    Raises:
        ValueError: a wrong shape or memory order.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    numbers, scales = out or (None, None)
    version = OPERATION.version(stream, x=x, numbers=numbers, scales=scales)
    arrays.expect("quantize_rows", "x", x, ("n", "m"), arrays.FLOAT32)
    if out is None:
        numbers = arrays.empty(x, x.shape, arrays.INT8, stream)
        scales = arrays.empty(x, x.shape[:1], arrays.FLOAT32, stream)
    arrays.expect_output("quantize_rows", "out[0]", numbers, x.shape, arrays.INT8)
    arrays.expect_output("quantize_rows", "out[1]", scales, x.shape[:1], arrays.FLOAT32)
    version.quantize(x, numbers, scales, stream)
    return numbers, scales


def dequantize_rows(numbers: Any, scales: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Return numbers * scales, row by row: approximately the input of `quantize_rows`.

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
    arrays.expect("dequantize_rows", "numbers", numbers, ("n", "m"), arrays.INT8)
    arrays.expect("dequantize_rows", "scales", scales, numbers.shape[:1], arrays.FLOAT32)
    if out is None:
        out = arrays.empty(numbers, numbers.shape, arrays.FLOAT32, stream)
    arrays.expect_output("dequantize_rows", "out", out, numbers.shape, arrays.FLOAT32)
    version.dequantize(numbers, scales, out, stream)
    return out


def warm_up() -> None:
    """Compile every variant of the chosen backend."""
    dequantize_rows(*quantize_rows(arrays.at_choice(np.zeros((1, 1), np.float32))))
