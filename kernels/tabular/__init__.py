"""Preprocessing of table rows for a model: fills missing numbers, standardises numbers, encodes categories one-hot.

    numbers [n, f] ──  ((NaN -> fill) - mean) * 1/std   ──> out[:, :f]
    codes   [n, c] ──  1 where equal to the known value ──> out[:, f:], one column for each value of each category

One pass equals scikit-learn's SimpleImputer, StandardScaler and OneHotEncoder(handle_unknown="ignore").
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
    """Return the encoded rows, [n, columns.width] float32.

    A value outside a column's categories gives zeros. Infinities stay infinite, and NaN without a `fill` stays NaN. The
    arithmetic uses the numbers' dtype: use float64 when a mean is large beside the spread (times, ids).

    Args:
        columns: parameters of the columns, on the device of the rows (`Columns.on_device`).
        numbers: [n, f] of `columns.dtype`, NaN where missing.
        codes: [n, c] int64 or int32; None without categories.
        out: [n, columns.width] float32; allocated when None.
        stream: the `cupy.cuda.Stream` to run on; None is CuPy's current one. The call does not wait for it.

    Returns:
        `out`.

    Raises:
        ValueError: a wrong shape or memory order.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    version = OPERATION.version(stream, numbers=numbers, codes=codes, out=out, columns=columns.mean)
    f, c = columns.inputs
    arrays.expect("tabular", "numbers", numbers, ("n", f), columns.dtype)
    n = numbers.shape[0]
    if codes is None:
        codes = arrays.empty(numbers, (n, 0), arrays.INT64, stream)
    arrays.expect("tabular", "codes", codes, (n, c), arrays.INT64, arrays.INT32)
    if out is None:
        out = arrays.empty(numbers, (n, columns.width), arrays.FLOAT32, stream)
    arrays.expect_output("tabular", "out", out, (n, columns.width), arrays.FLOAT32)
    version.run(columns, numbers, codes, out, stream)
    return out


def warm_up() -> None:
    """Compile every variant of the chosen backend."""
    for dtype in ("float32", "float64"):
        for code in ("int32", "int64"):
            parameters = columns(mean=[0], categories=[[0]], dtype=dtype)
            numbers, codes = arrays.at_choice(np.zeros((1, 1), dtype)), arrays.at_choice(np.zeros((1, 1), code))
            tabular(parameters if isinstance(numbers, np.ndarray) else parameters.on_device(), numbers, codes)
