"""What every operation asks of its arrays: one place, exact dtypes, memory in order. Nothing is converted or moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from kernels import arrays
from kernels.nms import nms
from kernels.pad_tokens import pad_tokens
from kernels.pool_normalize import l2_normalize, pool_normalize
from kernels.quantize_rows import dequantize_rows, quantize_rows
from kernels.softmax_topk import softmax_topk
from kernels.tabular import columns, tabular


class DeviceArray:
    """What a CuPy array shows of itself without a GPU."""

    __cuda_array_interface__: ClassVar[dict[str, object]] = {}


DeviceArray.__module__ = "cupy"
DEVICE = DeviceArray()
ROWS, INDICES, OFFSETS = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64), np.array([0, 2], np.int64)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pad_tokens(np.zeros(2, np.int32), DEVICE),
        lambda: pad_tokens(np.zeros(2, np.int32), OFFSETS, out=(INDICES, DEVICE)),
        lambda: tabular(columns(mean=[0, 0, 0]), ROWS, DEVICE),
        lambda: tabular(columns(mean=[0, 0, 0]), DEVICE),
        lambda: pool_normalize(np.zeros((2, 3, 4), np.float32), DEVICE),
        lambda: l2_normalize(ROWS, out=DEVICE),
        lambda: softmax_topk(DEVICE, 1, out=(ROWS, INDICES)),
        lambda: quantize_rows(ROWS, out=(DEVICE, np.zeros(2, np.float32))),
        lambda: dequantize_rows(DEVICE, np.zeros(2, np.float32)),
        lambda: nms(np.zeros((1, 4), np.float32), DEVICE, 0.5),
        lambda: nms(np.zeros((1, 4), np.float32), np.zeros(1, np.float32), 0.5, groups=DEVICE),
    ],
)
def test_arrays_of_two_places_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="host and device arrays in one call"):
        call()


def test_another_byte_order_is_another_dtype() -> None:
    with pytest.raises(TypeError, match="x must be float32, not >f4"):
        arrays.expect("op", "x", ROWS.astype(">f4"), ("n", "m"), arrays.FLOAT32)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        (("n", "m"), True),
        ((2, "m"), True),
        ((2, 3), True),
        (("n", 4), False),
        (("n",), False),
        (("n", "m", "k"), False),
    ],
)
def test_shapes(shape: arrays.Shape, fits: bool) -> None:
    if fits:
        arrays.expect("op", "x", ROWS, shape, arrays.FLOAT32)
        return
    with pytest.raises(ValueError, match=r"op: x must have shape \[.*\], not \[2, 3\]"):
        arrays.expect("op", "x", ROWS, shape, arrays.FLOAT32)


def askew(size: int) -> np.ndarray:
    return np.zeros(4 * size + 1, np.uint8)[1:].view(np.float32)


def test_outputs_must_be_writable_and_aligned() -> None:
    arrays.expect("op", "x", askew(3), (3,), arrays.FLOAT32)
    for out in (askew(3), np.frombuffer(b"123456789012", np.float32)):
        with pytest.raises(ValueError, match="op: out is read-only, or its address is not a multiple of its 4 bytes"):
            arrays.expect_output("op", "out", out, (3,), arrays.FLOAT32)


def test_what_numba_gets_is_one_type() -> None:
    mine = np.arange(3, dtype=np.float32)
    frozen = arrays.frozen(mine)
    assert np.shares_memory(frozen, mine)
    assert mine.flags.writeable
    assert not frozen.flags.writeable
    moved = arrays.frozen(askew(3))
    assert moved.flags.aligned
    assert not moved.flags.writeable
