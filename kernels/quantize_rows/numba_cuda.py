"""quantize_rows on a GPU: one block of threads per row to quantize, one thread per element to dequantize."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float32

from kernels import numba_launch
from kernels.quantize_rows.reference import MIN_ABSMAX, QMAX

# A power of two, because the maximum is reduced by halves.
THREADS = 128
REGISTERS = 40
INFINITY = np.float32(np.inf)
NAN = np.float32(np.nan)
# Floats near this value have no fraction bits, so adding it rounds to nearest even. `round` would use double precision.
ROUNDER = np.float32(1.5 * 2**23)
SIGNATURES = {
    "quantize_row": ["void(float32[:,::1], int8[:,::1], float32[::1])"],
    "dequantize_element": ["void(int8[:,::1], float32[::1], float32[:,::1])"],
}


@cuda.jit
def quantize_row(x, quantized, scales):
    """Quantize one row of `x`, float32 [n, m], per block, into `quantized`, int8 [n, m], and `scales`, float32 [n]."""
    block_absmax = cuda.shared.array(THREADS, float32)
    i, t = cuda.blockIdx.x, cuda.threadIdx.x
    m = x.shape[1]
    absmax = np.float32(0)
    for j in range(t, m, THREADS):
        magnitude = abs(x[i, j])
        # NaN is not below infinity: it becomes infinity, which no later element exceeds.
        if not magnitude < INFINITY:
            magnitude = INFINITY
        if magnitude > absmax:
            absmax = magnitude
    block_absmax[t] = absmax
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half and block_absmax[t + half] > block_absmax[t]:
            block_absmax[t] = block_absmax[t + half]
        cuda.syncthreads()
        half //= 2
    absmax = block_absmax[0]
    scaled = MIN_ABSMAX <= absmax < INFINITY
    scale = absmax / QMAX
    for j in range(t, m, THREADS):
        quantized[i, j] = np.int8(x[i, j] / scale + ROUNDER - ROUNDER) if scaled else np.int8(0)
    if t == 0:
        scales[i] = scale if scaled else np.float32(0) if absmax < MIN_ABSMAX else NAN


@cuda.jit
def dequantize_element(quantized, scales, out):
    """Write quantized * scales, int8 [n, m] and float32 [n], to `out`, float32 [n, m]; one column per thread."""
    n, m = out.shape
    j = cuda.grid(1)
    if j >= m:
        return
    for i in range(cuda.blockIdx.y, n, cuda.gridDim.y):
        out[i, j] = np.float32(quantized[i, j]) * scales[i]


def quantize(x: Any, quantized: Any, scales: Any, stream: Any = None) -> None:
    if x.shape[0]:
        numba_launch.launch(quantize_row, (x.shape[0], 1), (THREADS, 1), (x, quantized, scales), stream)


def dequantize(quantized: Any, scales: Any, out: Any, stream: Any = None) -> None:
    if out.size:
        grid, block = numba_launch.covering(out.shape, THREADS)
        numba_launch.launch(dequantize_element, grid, block, (quantized, scales, out), stream)
