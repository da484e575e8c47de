"""Which version of an operation runs: the arrays say so, and `KERNELS_BACKEND` may insist.

    KERNELS_BACKEND   host arrays (NumPy)   device arrays (CuPy)
    not set           cpu                   cuda
    cuda              error                 cuda
    cpu               cpu                   error
    reference         reference             error

Nothing is copied between host and device, and nothing falls back: arrays of both kinds in one call are an error, and
so is asking for `cuda` where CuPy sees no device. The variable and the device are looked at once in a process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import warnings
from functools import cache
from typing import Any, Literal

import numpy as np

Backend = Literal["cuda", "cpu", "reference"]
VARIABLE = "KERNELS_BACKEND"
_ON_HOST = {np.ndarray, type(None)}


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here."""


@cache
def device_available() -> bool:
    """Whether CuPy is installed and sees a GPU with a working driver."""
    if importlib.util.find_spec("cupy") is None:
        return False
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        # Installed and broken: most often two of its builds in one environment.
        warnings.warn(f"cupy is installed but cannot be imported, kernels run on the CPU: {error}", stacklevel=2)
        return False
    return bool(cupy.cuda.is_available())


@cache
def wanted() -> Backend | None:
    """What `KERNELS_BACKEND` insists on; None when it is not set.

    Raises:
        BackendError: the variable names no backend, or `cuda` and there is no device.
    """
    value = os.environ.get(VARIABLE, "")
    match value:
        case "":
            return None
        case "cpu" | "reference":
            return value
        case "cuda":
            if not device_available():
                raise BackendError(f"{VARIABLE}=cuda, but {why_no_device()}; unset it, or set it to cpu")
            return "cuda"
        case _:
            raise BackendError(f"{VARIABLE}={value!r} is none of cuda, cpu, reference")


def choice() -> Backend:
    """Where a caller should put its arrays: what is wanted, else `cuda` with a device and `cpu` without.

    Raises:
        BackendError: as `wanted`.
    """
    return wanted() or ("cuda" if device_available() else "cpu")


def forget() -> None:
    """Looks at the variable and the device again: for tests."""
    device_available.cache_clear()
    wanted.cache_clear()


def on_device(array: object) -> bool:
    """Whether an array lies on a GPU. NumPy has no such attribute, and CuPy need not be imported to ask."""
    return not isinstance(array, np.ndarray) and hasattr(array, "__cuda_array_interface__")


class Operation:
    """The versions of one operation, each imported when it first runs.

    Args:
        package: of the operation, whose modules `reference`, `cpu`, and `cuda` or `numba_cuda` are its versions.
        gpu: which module is the GPU's.
    """

    def __init__(self, package: str, gpu: Literal["cuda", "numba_cuda"]) -> None:
        self.name = package.rpartition(".")[2]
        self._package = package
        self._gpu = gpu
        self._loaded: dict[Backend, Any] = {}

    def version(self, stream: object = None, **arrays: object) -> Any:
        """The module that runs on these arrays; those that are None do not count.

        Raises:
            TypeError: host and device arrays in one call, something that is no array, or a stream for host arrays.
            BackendError: `KERNELS_BACKEND` insists on another place than where the arrays are.
        """
        device = self._device(arrays)
        if stream is not None and not device:
            raise TypeError(f"{self.name}: stream= is for arrays on a GPU; these are on the host")
        return self.load(self._backend(device))

    def load(self, backend: Backend) -> Any:
        """The module of one version."""
        module = self._loaded.get(backend)
        if module is None:
            name = self._gpu if backend == "cuda" else backend
            module = self._loaded[backend] = _imported(f"{self._package}.{name}")
        return module

    def _device(self, arrays: dict[str, object]) -> bool:
        if _ON_HOST.issuperset(map(type, arrays.values())):
            return False  # As nearly always: a sixth of the time of what follows.
        places = {name: self._place(name, array) for name, array in arrays.items() if array is not None}
        if len(set(places.values())) > 1:
            told = ", ".join(f"{name} on the {place}" for name, place in places.items())
            raise TypeError(f"{self.name}: host and device arrays in one call ({told}); copy them to one place first")
        return "device" in places.values()

    def _place(self, name: str, array: object) -> str:
        if isinstance(array, np.ndarray):
            return "host"
        if type(array).__module__.partition(".")[0] == "cupy":
            return "device"
        if on_device(array):
            raise TypeError(
                f"{self.name}: {name} is {_kind(array)}; wrap it with cupy.asarray(...), which copies nothing"
            )
        raise TypeError(f"{self.name}: {name} must be a NumPy or CuPy array, not {_kind(array)}")

    def _backend(self, device: bool) -> Backend:
        insisted = wanted()
        if insisted is None:
            return "cuda" if device else "cpu"
        if (insisted == "cuda") != device:
            where = "on a GPU" if device else "on the host"
            raise BackendError(f"{self.name}: the arrays are {where}, but {VARIABLE}={insisted}")
        return insisted


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        # Neither this package, nor a home, nor NUMBA_CACHE_DIR can be written: a container whose files are read-only.
        # The folder is fresh and this process's own, because numba unpickles what it finds there.
        importlib.import_module("numba").config.CACHE_DIR = tempfile.mkdtemp(prefix="shoal-numba-")
        return importlib.import_module(name)


def _kind(array: object) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def why_no_device() -> str:
    """For messages, where `device_available` is false."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (extras cuda12 and cuda13)"
    return "cupy finds no GPU with a working driver"
