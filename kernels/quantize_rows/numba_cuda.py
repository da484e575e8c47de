"""quantize_rows on a GPU: one block of threads per row to quantize, one thread per element to dequantize."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float32

from kernels import numba_launch
from kernels.quantize_rows.reference import LEAST, LEVELS

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
def quantize_row(x, numbers, scales):
    most_of = cuda.shared.array(THREADS, float32)
    i, t = cuda.blockIdx.x, cuda.threadIdx.x
    m = x.shape[1]
    most = np.float32(0)
    for j in range(t, m, THREADS):
        magnitude = abs(x[i, j])
        # NaN is not below infinity: it becomes infinity, which no later element exceeds.
        if not magnitude < INFINITY:
            magnitude = INFINITY
        if magnitude > most:
            most = magnitude
    most_of[t] = most
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half and most_of[t + half] > most_of[t]:
            most_of[t] = most_of[t + half]
        cuda.syncthreads()
        half //= 2
    most = most_of[0]
    scaled = LEAST <= most < INFINITY
    scale = most / LEVELS
    for j in range(t, m, THREADS):
        numbers[i, j] = np.int8(x[i, j] / scale + ROUNDER - ROUNDER) if scaled else np.int8(0)
    if t == 0:
        scales[i] = scale if scaled else np.float32(0) if most < LEAST else NAN


@cuda.jit
def dequantize_element(numbers, scales, out):
    n, m = out.shape
    j = cuda.grid(1)
    if j >= m:
        return
    for i in range(cuda.blockIdx.y, n, cuda.gridDim.y):
        out[i, j] = np.float32(numbers[i, j]) * scales[i]


def quantize(x: Any, numbers: Any, scales: Any, stream: Any = None) -> None:
    if x.shape[0]:
        numba_launch.launch(quantize_row, (x.shape[0], 1), (THREADS, 1), (x, numbers, scales), stream)


def dequantize(numbers: Any, scales: Any, out: Any, stream: Any = None) -> None:
    if out.size:
        grid, block = numba_launch.covering(out.shape, THREADS)
        numba_launch.launch(dequantize_element, grid, block, (numbers, scales, out), stream)
