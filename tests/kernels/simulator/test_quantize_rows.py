"""quantize_rows' GPU version: bit for bit the reference's."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.quantize_rows import dequantize_rows, quantize_rows, reference

NAN, INF = float("nan"), float("inf")


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "one": np.array([[-3.5]], np.float32),
        "a few": rng.normal(size=(4, 7)).astype(np.float32),
        "as many as threads": rng.normal(size=(2, 128)).astype(np.float32),
        "more than threads": (rng.normal(size=(2, 301)) * [[1e-30], [1e30]]).astype(np.float32),
        "halves": np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127]], np.float32),
        "no numbers": np.array([[1, NAN], [INF, 1], [-INF, NAN], [1, 2]], np.float32),
        "small": np.array([[0, -0.0], [1e-45, 0], [reference.MIN_ABSMAX, 0], [1.4e-36, -1.4e-36]], np.float32),
        "large": np.array([[3.4028235e38, -3.4028235e38, 1]], np.float32),
        "no columns": np.empty((3, 0), np.float32),
        "no rows": np.empty((0, 3), np.float32),
    }


@pytest.mark.parametrize("name", rows())
def test_equals_the_reference(name):
    x = rows()[name]
    want = np.full(x.shape, -99, np.int8), np.full(len(x), 99, np.float32)
    reference.quantize(x, *want)
    got = quantize_rows(x, out=(np.full(x.shape, -99, np.int8), np.full(len(x), 99, np.float32)))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    back = dequantize_rows(*got, out=np.full(x.shape, np.nan, np.float32))
    np.testing.assert_array_equal(back, want[0].astype(np.float32) * want[1][:, None])
