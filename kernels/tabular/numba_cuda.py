"""tabular on a GPU: one thread per element of the output."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from kernels import numba_launch
from kernels.tabular.columns import Columns

THREADS = 128
REGISTERS = 40
# Signatures for float32 numbers only: the compile-only test rejects double precision, which float64 numbers need.
SIGNATURES = {
    "element": [
        f"void(float32[:,::1], {code}[:,::1], float32[::1], float32[::1], float32[::1], int64[::1], int32[::1], "
        "float32[:,::1])"
        for code in ("int64", "int32")
    ]
}


@cuda.jit
def element(numbers, codes, fill, mean, scale, categories, owners, out):
    n, width = out.shape
    f = mean.size
    column = cuda.grid(1)
    if column >= width:
        return
    for i in range(cuda.blockIdx.y, n, cuda.gridDim.y):
        if column < f:
            v = numbers[i, column]
            out[i, column] = ((fill[column] if v != v else v) - mean[column]) * scale[column]
        else:
            k = column - f
            out[i, column] = np.float32(1) if categories[k] == codes[i, owners[k]] else np.float32(0)


def run(columns: Columns, numbers: Any, codes: Any, out: Any, stream: Any = None) -> None:
    if out.size:
        grid, block = numba_launch.covering(out.shape, THREADS)
        c = columns
        arguments = (numbers, codes, c.fill, c.mean, c.scale, c.categories, c.owners, out)
        numba_launch.launch(element, grid, block, arguments, stream)
