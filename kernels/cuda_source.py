"""A CUDA C++ file beside its operation, compiled by CuPy (NVRTC) when it is first launched on a device.

Arguments are what `cupy.RawKernel` takes: CuPy arrays, and NumPy scalars of exactly the parameter's type.
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
"""Above this a kernel has to ask for shared memory; how much more there is depends on the device."""
Extent = tuple[int, int, int]
Launch = Callable[[str, Extent, Extent, Sequence[Any], int, Any], None]


@dataclass(frozen=True)
class CudaSource:
    """One `.cu` file and the kernels in it."""

    path: Path
    kernels: tuple[str, ...]
    """Name expressions, `resize<float, true>`: each is compiled, and the compile-only test walks over all of them."""
    registers: int
    """The most that a thread of any of them may use on sm_80 and sm_90: a test holds it."""

    def launch(
        self,
        kernel: str,
        grid: Extent,
        block: Extent,
        args: Sequence[Any],
        shared_bytes: int = 0,
        stream: Any = None,
    ) -> None:
        """Puts one launch on `stream`, a `cupy.cuda.Stream`, or on CuPy's current one. Waits for nothing."""
        self._launcher(kernel, grid, block, args, shared_bytes, stream)

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def _launcher(self) -> Launch:
        return launcher(self)


def launcher(source: CudaSource) -> Launch:
    """How kernels of a source are launched. Tests put a compiler for the CPU in this place."""
    cupy = importlib.import_module("cupy")
    module = cupy.RawModule(code=source.text, options=OPTIONS, name_expressions=source.kernels)
    found: dict[str, Any] = {}

    def launch(kernel: str, grid: Extent, block: Extent, args: Sequence[Any], shared_bytes: int, stream: Any) -> None:
        function = found.get(kernel)
        if function is None:
            function = found[kernel] = module.get_function(kernel)
        here = cupy.cuda.runtime.getDevice()
        for arg in args:
            if isinstance(arg, cupy.ndarray) and arg.data.device_id != here:
                raise ValueError(f"{kernel}: an array is on GPU {arg.data.device_id}, the current device is {here}")
        if shared_bytes > _FREE_SHARED_BYTES and function.max_dynamic_shared_size_bytes < shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        if stream is None:
            function(grid, block, tuple(args), shared_mem=shared_bytes)
        else:
            with stream:
                function(grid, block, tuple(args), shared_mem=shared_bytes)

    return launch
