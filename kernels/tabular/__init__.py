"""Table rows as a model takes them: missing numbers filled, numbers standardised, categories one-hot.

    numbers [n, f] ──  ((NaN -> fill) - mean) * 1/std   ──> out[:, :f]
    codes   [n, c] ──  1 where equal to the known value ──> out[:, f:], one column for each value of each category

What scikit-learn's SimpleImputer, StandardScaler and OneHotEncoder(handle_unknown="ignore") do, in one pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation
from kernels.tabular.columns import Columns, columns

__all__ = ["Columns", "columns", "tabular", "warm_up"]

OPERATION = Operation(__name__, gpu="numba_cuda")


def tabular(columns: Columns, numbers: Any, codes: Any = None, *, out: Any = None, stream: Any = None) -> Any:
    """The rows, [n, columns.width] float32.

    A value that is not among a column's categories gives zeros. Infinities stay infinite, NaN without a `fill` NaN.
    The arithmetic is that of the numbers' dtype: give float64 where a mean is large beside the spread (times, ids).

    Args:
        columns: what to do, in the same place as the rows (`Columns.on_device`).
        numbers: [n, f] of `columns.dtype`, NaN where missing.
        codes: [n, c] int64 or int32; None where there are no categories.
        out: [n, columns.width] float32; allocated when None.
        stream: the `cupy.cuda.Stream` to run on, CuPy's current one when None. Nothing waits for it.

    Returns:
        `out`.

    Raises:
        ValueError: a wrong shape or order of memory.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    version = OPERATION.version(stream, numbers=numbers, codes=codes, out=out, columns=columns.mean)
    f, c = columns.inputs
    arrays.expect("tabular", "numbers", numbers, ("n", f), columns.dtype.name)
    n = numbers.shape[0]
    if codes is None:
        codes = arrays.empty(numbers, (n, 0), "int64", stream)
    arrays.expect("tabular", "codes", codes, (n, c), "int64", "int32")
    if out is None:
        out = arrays.empty(numbers, (n, columns.width), "float32", stream)
    arrays.expect_output("tabular", "out", out, (n, columns.width), "float32")
    version.run(columns, numbers, codes, out, stream)
    return out


def warm_up() -> None:
    """Compiles what a call would compile."""
    for dtype in ("float32", "float64"):
        for code in ("int32", "int64"):
            given = columns(mean=[0], categories=[[0]], dtype=dtype)
            numbers, codes = arrays.at_choice(np.zeros((1, 1), dtype)), arrays.at_choice(np.zeros((1, 1), code))
            tabular(given if isinstance(numbers, np.ndarray) else given.on_device(), numbers, codes)
