"""Number of GPUs that this process may use."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache


@cache
def count() -> int:
    """Return the number of GPUs that CUDA's driver reports (it obeys CUDA_VISIBLE_DEVICES); 0 without a driver."""
    number = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(number)) == 0:
            return number.value
    return 0
