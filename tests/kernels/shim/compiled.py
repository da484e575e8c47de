"""CUDA C++ kernels compiled by g++ and run on the CPU: every thread of a block is a fiber (cuda_on_cpu.h).

Each array that a kernel gets is copied between two pages that nobody may touch, flush with the hind one (or the front
one), at 16 bytes' alignment; the bytes of its own pages around it are checked afterwards.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kernels.cuda_source import CudaSource, Extent

HERE = Path(__file__).resolve().parent
_CHECKS = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,null,return,unreachable"
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-shared",
    "-fPIC",
    "-w",
    f"-fsanitize={_CHECKS}",
    "-fsanitize-undefined-trap-on-error",
)
_GUARD_BYTES = 4096
_POISON = 0xA5


class KernelFault(Exception):
    """What a GPU would have answered with an error, or with wrong numbers."""


@dataclass
class Shim:
    """The kernels of one source on the CPU; `launch` stands where `cuda_source.launcher` gives CuPy's."""

    source: CudaSource
    folder: Path
    backward: bool = False
    """Run the threads of a block from the last to the first, and put arrays at the front guard."""
    launches: int = field(default=0, init=False)

    def launch(
        self, kernel: str, grid: Extent, block: Extent, args: Sequence[Any], shared_bytes: int = 0, stream: Any = None
    ) -> None:
        """Runs one launch to its end.

        Raises:
            KernelFault: an access out of bounds or misaligned, a barrier not reached by all, wrong arguments.
        """
        if stream is not None:
            raise TypeError("there are no streams here")
        number = self.source.kernels.index(kernel)
        guarded = [_Guarded(self._library, arg, self.backward) if isinstance(arg, np.ndarray) else None for arg in args]
        try:
            values = [held.pointer() if held else _bytes_of(arg) for held, arg in zip(guarded, args, strict=True)]
            self._check_sizes(number, [len(value) for value in values])
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            extents = (ctypes.c_uint * 6)(*grid, *block)
            failed = self._library.shim_launch(number, extents, ctypes.c_size_t(shared_bytes), self.backward, pointers)
            self.launches += 1
            if failed:
                raise KernelFault(f"{kernel}: {self._library.shim_message().decode()}{self._blame(guarded)}")
            for n, held in enumerate(guarded):
                if held is not None and not held.take_back():
                    raise KernelFault(f"{kernel}: wrote outside of argument {n}")
        finally:
            for held in guarded:
                if held is not None:
                    held.close()

    def _check_sizes(self, number: int, given: list[int]) -> None:
        sizes = (ctypes.c_int * 64)()
        count = self._library.shim_sizes(number, sizes)
        if given != list(sizes[:count]):
            raise KernelFault(
                f"{self.source.kernels[number]}: parameters of {list(sizes[:count])} bytes, given {given}"
            )

    def _blame(self, guarded: list[_Guarded | None]) -> str:
        address = self._library.shim_fault_address()
        for n, held in enumerate(guarded):
            if held is not None and held.base <= address < held.base + held.mapped:
                return f" (argument {n}, byte {address - held.at} of {held.array.nbytes})"
        return ""

    @cached_property
    def _library(self) -> ctypes.CDLL:
        name = f"{self.source.path.parent.name}_{self.source.path.stem}"
        code, built = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        code.write_text(_program(self.source))
        try:
            subprocess.run(
                ["g++", *_FLAGS, f"-I{HERE}", str(code), "-o", str(built)], check=True, stderr=subprocess.PIPE
            )
        except FileNotFoundError:
            raise RuntimeError(
                "the CUDA kernels are run on the CPU with g++, which is missing: apt install g++"
            ) from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"g++ refuses {self.source.path}:\n{error.stderr.decode()[:4000]}") from None
        library = ctypes.CDLL(str(built))
        library.shim_message.restype = ctypes.c_char_p
        library.shim_fault_address.restype = ctypes.c_size_t
        library.shim_guarded.restype = ctypes.c_size_t
        library.shim_guarded.argtypes = [ctypes.c_size_t]
        library.shim_release.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        return library


class _Guarded:
    """A copy of an array, with no page before and behind it that may be touched."""

    def __init__(self, library: ctypes.CDLL, array: np.ndarray, at_front: bool) -> None:
        if not array.flags.c_contiguous:
            raise KernelFault("kernels take contiguous arrays")
        self.array, self._library = array, library
        self._rounded = -(-array.nbytes // 16) * 16
        inside = -(-max(self._rounded, 1) // _GUARD_BYTES) * _GUARD_BYTES
        self.mapped = inside + 2 * _GUARD_BYTES
        self.base = library.shim_guarded(self.mapped)
        if not self.base:
            raise MemoryError("no memory for a guarded array")
        self.at = self.base + _GUARD_BYTES + (0 if at_front else inside - self._rounded)
        ctypes.memset(self.base + _GUARD_BYTES, _POISON, inside)
        ctypes.memmove(self.at, array.ctypes.data, array.nbytes)

    def pointer(self) -> Any:
        return (ctypes.c_char * 8).from_buffer_copy(ctypes.c_size_t(self.at))

    def take_back(self) -> bool:
        """Copies the array back; False when a byte around it was written."""
        around = (
            ctypes.string_at(self.base + _GUARD_BYTES, self.at - self.base - _GUARD_BYTES),
            ctypes.string_at(
                self.at + self.array.nbytes, self.base + self.mapped - _GUARD_BYTES - self.at - self.array.nbytes
            ),
        )
        if self.array.flags.writeable:
            ctypes.memmove(self.array.ctypes.data, self.at, self.array.nbytes)
        return all(part.count(_POISON) == len(part) for part in around)

    def close(self) -> None:
        self._library.shim_release(self.base, self.mapped)


def _bytes_of(arg: Any) -> Any:
    if not isinstance(arg, np.generic):
        raise KernelFault(f"a kernel's scalar must be a NumPy scalar of its exact type, not {type(arg).__name__}")
    return (ctypes.c_char * arg.nbytes).from_buffer_copy(arg.tobytes())


def _program(source: CudaSource) -> str:
    """The kernel's text as C++, and doors for ctypes. Only declarations of shared memory are written anew."""
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?([\w:\s]+?)\s+(\w+)\[\];",
        r"\1* const \2 = shim::dynamic_shared<\1>();",
        source.text,
    )
    text = re.sub(
        r"(?<!extern )__shared__\s+([\w:]+)\s+(\w+)((?:\[[^\]]+\])*);",
        r"auto& \2 = shim::block_static<\1\3, __COUNTER__>();",
        text,
    )
    cases = list(enumerate(source.kernels))
    launches = "\n".join(
        f"        case {n}: return shim::launch_kernel(&{name}, grid, block, shared, backward, args);"
        for n, name in cases
    )
    sizes = "\n".join(f"        case {n}: return shim::parameter_sizes(&{name}, sizes);" for n, name in cases)
    return f"""#include "cuda_on_cpu.h"
#line 1 "{source.path}"
{text}
extern "C" int shim_launch(int kernel, const unsigned* e, size_t shared, int backward, void** args) {{
    dim3 grid{{e[0], e[1], e[2]}}, block{{e[3], e[4], e[5]}};
    switch (kernel) {{
{launches}
    }}
    return -1;
}}
extern "C" int shim_sizes(int kernel, int* sizes) {{
    switch (kernel) {{
{sizes}
    }}
    return -1;
}}
extern "C" const char* shim_message() {{ return shim::message; }}
extern "C" size_t shim_fault_address() {{ return shim::fault_address; }}
extern "C" size_t shim_guarded(size_t bytes) {{
    void* base = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return 0;
    if (mprotect((char*)base + {_GUARD_BYTES}, bytes - {2 * _GUARD_BYTES}, PROT_READ | PROT_WRITE)) return 0;
    return (size_t)base;
}}
extern "C" void shim_release(size_t base, size_t bytes) {{ munmap((void*)base, bytes); }}
"""
