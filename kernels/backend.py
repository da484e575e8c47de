"""Selection of an operation's version, by the device of its arrays; `KERNELS_BACKEND` forces a version.

    KERNELS_BACKEND   host arrays (NumPy)   device arrays (CuPy)
    not set           cpu                   cuda
    cuda              error                 cuda
    cpu               cpu                   error
    reference         reference             error

Nothing is copied between host and device, and there is no fallback. Host and device arrays in one call are an error.
`KERNELS_BACKEND=cuda` without a device is an error too. A process reads the variable and detects the device once.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

Backend = Literal["cuda", "cpu", "reference"]
VARIABLE = "KERNELS_BACKEND"
# Every folder with this prefix is locked while its process lives.
_NUMBA_FOLDER = "shoal-tmp-numba-"
_own_locks: list[int] = []
_ON_HOST = {np.ndarray, type(None)}


class BackendError(RuntimeError):
    """The requested backend cannot run on this machine, or on these arrays."""


@cache
def device_available() -> bool:
    """Return True when CuPy is installed and finds a GPU with a working driver."""
    if importlib.util.find_spec("cupy") is None:
        return False
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        # The usual cause of a broken installation is two builds of CuPy in one environment.
        warnings.warn(f"cupy is installed but cannot be imported, kernels run on the CPU: {error}", stacklevel=2)
        return False
    return bool(cupy.cuda.is_available())


@cache
def forced() -> Backend | None:
    """Return the backend that `KERNELS_BACKEND` names, or None when the variable is not set.

    Raises:
        BackendError: the variable names no backend, or names `cuda` on a machine without a device.
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
    """Return the backend for new arrays: the forced one, else `cuda` with a device and `cpu` without.

    Raises:
        BackendError: as `forced`.
    """
    return forced() or ("cuda" if device_available() else "cpu")


def forget() -> None:
    """Clear the cached variable and device, so that the next call reads them again. For tests."""
    device_available.cache_clear()
    forced.cache_clear()


def on_device(array: object) -> bool:
    """Return True when an array is on a GPU. The check does not import CuPy: NumPy arrays lack the attribute."""
    return not isinstance(array, np.ndarray) and hasattr(array, "__cuda_array_interface__")


class Operation:
    """The versions of one operation, each imported at its first run.

    Args:
        package: package of the operation. The modules `reference`, `cpu`, and `cuda` or `numba_cuda` are its versions.
        gpu: name of the GPU's module.
    """

    def __init__(self, package: str, gpu: Literal["cuda", "numba_cuda"]) -> None:
        self.name = package.rpartition(".")[2]
        self._package = package
        self._gpu = gpu
        self._loaded: dict[Backend, Any] = {}

    def version(self, stream: object = None, **arrays: object) -> Any:
        """Return the module that runs on these arrays. Arguments that are None are ignored.

        Raises:
            TypeError: host and device arrays in one call, an argument that is no array, or a stream for host arrays.
            BackendError: `KERNELS_BACKEND` forces a backend on another device than that of the arrays.
        """
        device = self._device(arrays)
        if stream is not None and not device:
            raise TypeError(f"{self.name}: stream= is for arrays on a GPU; these are on the host")
        return self.load(self._backend(device))

    def load(self, backend: Backend) -> Any:
        """Return the module of one version, imported if necessary."""
        module = self._loaded.get(backend)
        if module is None:
            name = self._gpu if backend == "cuda" else backend
            module = self._loaded[backend] = _imported(f"{self._package}.{name}")
        return module

    def _device(self, arrays: dict[str, object]) -> bool:
        # Fast path for the common case: a sixth of the time of the general check.
        if _ON_HOST.issuperset(map(type, arrays.values())):
            return False
        locations = {name: self._location(name, array) for name, array in arrays.items() if array is not None}
        if len(set(locations.values())) > 1:
            listed = ", ".join(f"{name} on the {location}" for name, location in locations.items())
            raise TypeError(f"{self.name}: host and device arrays in one call ({listed}); copy them to one place first")
        return "device" in locations.values()

    def _location(self, name: str, array: object) -> str:
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
        backend = forced()
        if backend is None:
            return "cuda" if device else "cpu"
        if (backend == "cuda") != device:
            location = "on a GPU" if device else "on the host"
            raise BackendError(f"{self.name}: the arrays are {location}, but {VARIABLE}={backend}")
        return backend


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        # A container may have a read-only package, home folder and NUMBA_CACHE_DIR. The folder must be new and private
        # to this process, because numba unpickles the files in it.
        importlib.import_module("numba").config.CACHE_DIR = _private_folder()
        return importlib.import_module(name)


def _private_folder() -> str:
    """Return a new folder that this process locks until its end. Remove the unlocked folders of ended processes."""
    for left in Path(tempfile.gettempdir()).glob(f"{_NUMBA_FOLDER}*"):
        with contextlib.suppress(OSError):
            descriptor = _locked(left)
            if os.fstat(descriptor).st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    while True:
        folder = tempfile.mkdtemp(prefix=_NUMBA_FOLDER)
        # Until the folder is locked, another process that starts now may remove it.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            _own_locks.append(_locked(Path(folder)))
            if os.path.exists(folder):
                return folder


def _locked(folder: Path) -> int:
    """Return a descriptor that holds the lock of `folder`. Raises BlockingIOError when another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _kind(array: object) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def why_no_device() -> str:
    """Return the reason for a message when `device_available` is False."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (extras cuda12 and cuda13)"
    return "cupy finds no GPU with a working driver"
