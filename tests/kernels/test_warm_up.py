"""After `warm_up` no request compiles: not for any dtype that an operation takes, nor for views of received bytes.

In a fresh process, because other tests would have compiled what is missing.
"""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba.core.dispatcher import Dispatcher

from kernels import operations

Array = np.ndarray[Any, Any]
Given = Callable[[Array], Array]


def writable(array: Array) -> Array:
    return array


def received(array: Array) -> Array:
    """As from a message: read-only, and at an odd address."""
    return np.frombuffer(b"-" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


def calls(given: Given) -> Iterator[None]:
    """Every operation, with every combination of dtypes that its documentation names."""
    nms, pad = importlib.import_module("kernels.nms").nms, importlib.import_module("kernels.pad_tokens").pad_tokens
    pool, quantize = importlib.import_module("kernels.pool_normalize"), importlib.import_module("kernels.quantize_rows")
    softmax, table = importlib.import_module("kernels.softmax_topk"), importlib.import_module("kernels.tabular")
    resize = importlib.import_module("kernels.resize_norm")
    boxes, scores = given(np.ones((3, 4), np.float32)), given(np.ones(3, np.float32))
    for groups in (None, given(np.zeros(3, np.int32))):
        yield nms(boxes, scores, 0.5, groups=groups)
    offsets = given(np.array([0, 2], np.int64))
    for tokens, ids, mask in itertools.product((np.int32, np.int64), repeat=3):
        if np.dtype(ids).itemsize >= np.dtype(tokens).itemsize:
            yield pad(
                given(np.ones(2, tokens)), offsets, out=(np.ones((1, 3), ids), np.ones((1, 3), mask)), side="left"
            )
            yield pad(given(np.ones(2, tokens)), offsets)
    for kind in (np.float32, np.float16):
        yield softmax.softmax_topk(given(np.ones((2, 40), kind)), 33)
        yield pool.l2_normalize(given(np.ones((2, 3), kind)))
        for mask in (np.int64, np.int32, np.bool_):
            for normalize in (True, False):
                yield pool.pool_normalize(
                    given(np.ones((2, 3, 4), kind)), given(np.ones((2, 3), mask)), normalize=normalize
                )
    numbers, scales = quantize.quantize_rows(given(np.ones((2, 3), np.float32)))
    yield quantize.dequantize_rows(given(numbers), given(scales))
    for kind, code in itertools.product((np.float32, np.float64), (np.int32, np.int64)):
        made = table.columns(mean=[0, 1], categories=[[1]], dtype=np.dtype(kind).name)
        yield table.tabular(made, given(np.ones((2, 2), kind)), given(np.ones((2, 1), code)))
        yield table.tabular(table.columns(mean=[0], dtype=np.dtype(kind).name), given(np.ones((2, 1), kind)))
    for channels, dtype, layout in itertools.product((1, 3), (np.float32, np.float16, np.uint8), ("CHW", "HWC")):
        options: dict[str, Any] = {"size": (3, 5), "dtype": dtype, "layout": layout, "swap": channels == 3}
        picture = given(np.ones((4, 6, channels), np.uint8))
        packed = resize.pack([picture], (3, 5))
        yield resize.resize_norm([picture], boxes=[(0, 1, 2.5, 3)], antialias=False, **options)
        yield resize.resize_norm(resize.Packed(given(packed.pixels), given(packed.table)), channels=channels, **options)


def compiled() -> dict[str, int]:
    modules = [importlib.import_module(f"kernels.{name}.cpu") for name in operations.names()]
    return {
        f"{module.__name__}.{name}": len(value.signatures)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Dispatcher)
    }


def main() -> None:
    operations.warm_up()
    before = compiled()
    for given in (writable, received):
        for _ in calls(given):
            pass
    after = compiled()
    assert len(before) > 20
    late = {name: count for name, count in after.items() if count != before[name]}
    assert not late, f"compiled after warm_up: {late}"


def test_no_request_compiles() -> None:
    program = "from tests.kernels.test_warm_up import main; main()"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
