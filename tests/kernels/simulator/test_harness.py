"""What the simulator can tell, so that the tests beside this one mean something (tests/kernels/test_simulator.py)."""

from __future__ import annotations

import os

import numba_cuda
import numpy as np
import pytest
from numba import cuda


@cuda.jit
def twice(given, out):
    at = cuda.grid(1)
    if at < out.size:
        out[at] = given[at] * np.float32(2)


@cuda.jit
def too_far(out):
    out[cuda.grid(1) + 1] = 1


def test_this_is_the_simulator_of_the_package_that_is_used():
    assert os.environ["NUMBA_ENABLE_CUDASIM"] == "1"
    assert cuda.simulator.__file__.startswith(os.path.dirname(numba_cuda.__file__))


def test_a_kernel_runs():
    given = np.arange(37, dtype=np.float32)
    out = np.full_like(given, np.nan)
    twice[3, 16](given, out)
    assert np.array_equal(out, 2 * given)


def test_a_write_out_of_bounds_is_told():
    with pytest.raises(IndexError):
        too_far[1, 8](np.zeros(8, np.float32))
