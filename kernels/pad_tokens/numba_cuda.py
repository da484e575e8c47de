"""pad_tokens on a GPU: one thread for each element of the batch."""

from __future__ import annotations

from typing import Any

from numba import cuda

from kernels import numba_launch

THREADS = 128
REGISTERS = 48
SIGNATURES = {
    "pad": [
        f"void({flat}[::1], int64[::1], int64, boolean, {ids}[:,::1], {mask}[:,::1])"
        for flat, ids in (("int32", "int32"), ("int32", "int64"), ("int64", "int64"))
        for mask in ("int32", "int64")
    ]
}


@cuda.jit
def pad(flat, offsets, pad_id, left, ids, mask):
    n, width = ids.shape
    column = cuda.grid(1)
    if column >= width:
        return
    for i in range(cuda.blockIdx.y, n, cuda.gridDim.y):
        # The offsets are unchecked on a GPU: clamp them, so that only `flat` is read.
        begin = min(max(offsets[i], 0), flat.size)
        end = min(max(offsets[i + 1], begin), flat.size)
        length = min(end - begin, width)
        at = column - (width - length) if left else column
        if 0 <= at < length:
            ids[i, column] = flat[begin + at]
            mask[i, column] = 1
        else:
            ids[i, column] = pad_id
            mask[i, column] = 0


def survey(offsets: Any, size: int) -> tuple[None, int]:
    """Return no result: reading the offsets would wait for the device."""
    return None, -1


def run(flat: Any, offsets: Any, pad_id: int, left: bool, ids: Any, mask: Any, stream: Any = None) -> None:
    if ids.size:
        grid, block = numba_launch.covering(ids.shape, THREADS)
        numba_launch.launch(pad, grid, block, (flat, offsets, pad_id, left, ids, mask), stream)
