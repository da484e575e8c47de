"""CUDA C++ source file of an operation, compiled by CuPy (NVRTC) at the first launch on a device.

Launch arguments are those of `cupy.RawKernel`: CuPy arrays, and NumPy scalars of exactly the parameter's type.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

OPTIONS = ("-std=c++17",)
_FREE_SHARED_BYTES = 48 * 1024
"""Shared memory of a block without an opt-in. A kernel must request more; the maximum depends on the device."""
Extent = tuple[int, int, int]
Launch = Callable[[str, Extent, Extent, Sequence[Any], int, Any], None]


@dataclass(frozen=True)
class CudaSource:
    """One `.cu` file and the kernels in it."""

    path: Path
    kernels: tuple[str, ...]
    """Name expressions such as `resize<float, true>`. All are compiled, also by the compile-only test."""
    registers: int
    """Limit of registers per thread for every kernel on sm_80 and sm_90. A test checks it."""

    def launch(
        self,
        kernel: str,
        grid: Extent,
        block: Extent,
        args: Sequence[Any],
        shared_bytes: int = 0,
        stream: Any = None,
    ) -> None:
        """Enqueue one launch on `stream`, a `cupy.cuda.Stream`, or on CuPy's current stream. Does not wait."""
        self._launcher(kernel, grid, block, args, shared_bytes, stream)

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def _launcher(self) -> Launch:
        return launcher(self)


def launcher(source: CudaSource) -> Launch:
    """Return a function that launches the kernels of `source`. Tests replace it by a compiler for the CPU."""
    cupy = importlib.import_module("cupy")
    # CuPy finds the compiler in NVIDIA's wheels, but for CUDA 12 not their headers (cuda_fp16.h).
    headers = importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
    options = (*OPTIONS, f"-I{headers}") if headers else OPTIONS
    module = cupy.RawModule(code=source.text, options=options, name_expressions=source.kernels)
    found: dict[str, Any] = {}

    def launch(kernel: str, grid: Extent, block: Extent, args: Sequence[Any], shared_bytes: int, stream: Any) -> None:
        function = found.get(kernel)
        if function is None:
            function = found[kernel] = module.get_function(kernel)
        current = cupy.cuda.runtime.getDevice()
        for arg in args:
            if isinstance(arg, cupy.ndarray) and arg.data.device_id != current:
                raise ValueError(f"{kernel}: an array is on GPU {arg.data.device_id}, the current device is {current}")
        if shared_bytes > _FREE_SHARED_BYTES and function.max_dynamic_shared_size_bytes < shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        if stream is None:
            function(grid, block, tuple(args), shared_mem=shared_bytes)
        else:
            with stream:
                function(grid, block, tuple(args), shared_mem=shared_bytes)

    return launch
