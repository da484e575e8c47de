"""Where arrays lie and how they move, behind one door: a GPU by CuPy, or the host with plain NumPy.

On the host a stream is None, and copies and events are done when they return.
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
    """A mark in a stream."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        """Waits until the stream has come to the mark; returns at once when nothing was recorded."""


class Memory(Protocol):
    """One place where kernels run."""

    name: str
    """`cuda` or `cpu`, as ONNX Runtime names devices."""
    device_id: int

    def stream(self) -> Any:
        """A new stream that waits for no other."""

    def event(self) -> Event: ...

    def pinned(self, nbytes: int) -> Array:
        """uint8 [nbytes] on the host, which the device copies from and to by itself."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array where the kernels run."""

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """Within it, on the calling thread, what is made and computed is here, and on this stream."""

    def at(self, pointer: int, shape: tuple[int, ...], dtype: Any, owner: Any) -> Any:
        """An array over memory here that somebody else made, and that `owner` keeps."""

    def pointer(self, array: Any) -> int:
        """Where it begins."""

    def contiguous(self, array: Any) -> Any:
        """The array in C order: itself, or a copy on the stream that is `using`."""

    def join(self, arrays: Sequence[Any]) -> Any:
        """The rows of several arrays, one behind the other, as a new one; on the stream that is `using`."""

    def copy_in(self, host: Array, into: Any, stream: Any) -> None:
        """Puts one copy on the stream, of contiguous arrays of one size, and does not wait for it."""

    def copy_out(self, array: Any, into: Array, stream: Any) -> None:
        """The same, back to the host."""


class HostMemory:
    """No GPU: NumPy arrays, and nothing that has to be waited for."""

    name = "cpu"
    device_id = 0

    def stream(self) -> None:
        return None

    def event(self) -> Event:
        return _Past()

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
        held = _Held(pointer, nbytes, owner)
        found: Array = np.asarray(held).view(dtype).reshape(shape)
        return found

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


class _Held:
    """Bytes that somebody else made, as NumPy takes them: an array over it keeps it, and it keeps their owner."""

    def __init__(self, pointer: int, nbytes: int, owner: Any) -> None:
        self.owner = owner
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}


class _Past:
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
            # Who waits sleeps: a spinning thread would take a core from the decoders.
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
    """Where `backend.choice` puts arrays.

    Raises:
        BackendError: as `choice`.
    """
    return CudaMemory(device_id) if choice() == "cuda" else HostMemory()
