"""Memory of the device that runs kernels, with one interface for a GPU (CuPy) and for the host (NumPy).

On the host a stream is None, and copies and events are complete when their calls return.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kernels.backend import choice

Array = npt.NDArray[Any]


class Event(Protocol):
    """Marker in a stream."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        """Wait until the stream has passed the marker; return immediately when none was recorded."""


class Memory(Protocol):
    """Memory, streams and copies of one device that runs kernels."""

    name: str
    """`cuda` or `cpu`, as in ONNX Runtime's device names."""
    device_id: int

    def stream(self) -> Any:
        """Return a new stream that does not wait for other streams."""

    def event(self) -> Event: ...

    def pinned(self, nbytes: int) -> Array:
        """Return pinned host memory, uint8 [nbytes], that the device reads and writes asynchronously."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a new array on the device."""

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which the calling thread allocates and computes on this device and `stream`."""

    def at(self, pointer: int, shape: tuple[int, ...], dtype: Any, owner: Any) -> Any:
        """Return an array over existing device memory at `pointer`; `owner` keeps the memory alive."""

    def pointer(self, array: Any) -> int:
        """Return the address of an array's first byte."""

    def contiguous(self, array: Any) -> Any:
        """Return the array in C order: itself, or a copy made on the stream of `using`."""

    def join(self, arrays: Sequence[Any]) -> Any:
        """Concatenate the rows of several arrays into a new array, on the stream of `using`."""

    def copy_in(self, host: Array, into: Any, stream: Any) -> None:
        """Enqueue a copy from host to device on the stream, of contiguous arrays of equal size. Does not wait."""

    def copy_out(self, array: Any, into: Array, stream: Any) -> None:
        """Enqueue a copy from device to host on the stream, of contiguous arrays of equal size. Does not wait."""


class HostMemory:
    """Memory without a GPU: NumPy arrays, with every operation complete on return."""

    name = "cpu"
    device_id = 0

    def stream(self) -> None:
        return None

    def event(self) -> Event:
        return _PassedEvent()

    def pinned(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def using(self, stream: None) -> AbstractContextManager[Any]:
        return nullcontext()

    def at(self, pointer: int, shape: tuple[int, ...], dtype: Any, owner: Any) -> Array:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if not nbytes:
            return np.empty(shape, dtype)
        array: Array = np.asarray(_BorrowedBytes(pointer, nbytes, owner)).view(dtype).reshape(shape)
        return array

    def pointer(self, array: Array) -> int:
        return int(array.ctypes.data)

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def join(self, arrays: Sequence[Array]) -> Array:
        return np.concatenate(arrays)

    def copy_in(self, host: Array, into: Array, stream: None) -> None:
        np.copyto(into, host)

    def copy_out(self, array: Array, into: Array, stream: None) -> None:
        np.copyto(into, array)


class _BorrowedBytes:
    """Existing memory with NumPy's array interface. An array over it keeps this object, which keeps the owner."""

    def __init__(self, pointer: int, nbytes: int, owner: Any) -> None:
        self.owner = owner
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}


class _PassedEvent:
    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


class CudaMemory:
    """One GPU. Never run on one so far."""

    name = "cuda"

    def __init__(self, device_id: int = 0) -> None:
        self.device_id = device_id
        self._cupy = importlib.import_module("cupy")
        self._device = self._cupy.cuda.Device(device_id)

    def stream(self) -> Any:
        with self._device:
            return self._cupy.cuda.Stream(non_blocking=True)

    def event(self) -> Event:
        with self._device:
            # A blocking wait sleeps. A spinning thread would take a core from the decoders.
            event: Event = self._cupy.cuda.Event(block=True, disable_timing=True)
            return event

    def pinned(self, nbytes: int) -> Array:
        with self._device:
            return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        with self._device:
            return self._cupy.empty(shape, dtype)

    @contextmanager
    def using(self, stream: Any) -> Iterator[None]:
        with self._device, stream:
            yield

    def at(self, pointer: int, shape: tuple[int, ...], dtype: Any, owner: Any) -> Any:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if not nbytes:
            return self.empty(shape, dtype)
        held = self._cupy.cuda.UnownedMemory(pointer, nbytes, owner, self.device_id)
        return self._cupy.ndarray(shape, dtype, self._cupy.cuda.MemoryPointer(held, 0))

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def contiguous(self, array: Any) -> Any:
        return self._cupy.ascontiguousarray(array)

    def join(self, arrays: Sequence[Any]) -> Any:
        return self._cupy.concatenate(arrays)

    def copy_in(self, host: Array, into: Any, stream: Any) -> None:
        into.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)

    def copy_out(self, array: Any, into: Array, stream: Any) -> None:
        array.data.copy_to_host_async(into.ctypes.data, array.nbytes, stream)


def memory(device_id: int = 0) -> Memory:
    """Return the memory of the device that `backend.choice` selects.

    Raises:
        BackendError: as `choice`.
    """
    return CudaMemory(device_id) if choice() == "cuda" else HostMemory()
