"""Which version runs is said by the arrays and the variable, and never silently another one."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels import backend, operations
from kernels.backend import BackendError, Operation

HOST = np.zeros(2, np.float32)
OPERATION = Operation("kernels.some_operation", gpu="cuda")


class DeviceArray:
    """What a CuPy array shows of itself without a GPU."""

    __cuda_array_interface__ = None


DeviceArray.__module__ = "cupy"
DEVICE = DeviceArray()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(Operation, "load", lambda self, chosen: chosen)
    backend.forget()
    yield
    backend.forget()


def has_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: cupy)


def test_unset_the_arrays_decide() -> None:
    assert OPERATION.version(a=HOST, b=None) == "cpu"
    assert OPERATION.version(a=DEVICE) == "cuda"


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_host_versions_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", name)
    assert OPERATION.version(a=HOST) == backend.choice() == name
    with pytest.raises(BackendError, match=rf"on a GPU, but KERNELS_BACKEND={name}"):
        OPERATION.version(a=DEVICE)


def test_cuda_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    has_device(monkeypatch)
    monkeypatch.setenv("KERNELS_BACKEND", "cuda")
    assert OPERATION.version(a=DEVICE) == backend.choice() == "cuda"
    with pytest.raises(BackendError, match="on the host, but KERNELS_BACKEND=cuda"):
        OPERATION.version(a=HOST)


def test_where_a_caller_should_put_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.choice() == "cpu"
    backend.forget()
    has_device(monkeypatch)
    assert backend.choice() == "cuda"


def test_cuda_without_a_device_is_no_silent_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", "cuda")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"cupy is not installed \(extras cuda12 and cuda13\)"):
        backend.choice()
    with pytest.raises(BackendError, match="KERNELS_BACKEND=cuda"):
        OPERATION.version(a=HOST)


def test_a_broken_cupy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("libcublas is missing")

    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.importlib, "import_module", refuse)
    with pytest.warns(UserWarning, match="libcublas is missing"):
        assert backend.choice() == "cpu"


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELS_BACKEND", "gpu")
    with pytest.raises(BackendError, match="'gpu' is none of cuda, cpu, reference"):
        backend.choice()


def test_mixed_places_are_named() -> None:
    with pytest.raises(TypeError, match="pixels on the host, out on the device"):
        OPERATION.version(pixels=HOST, out=DEVICE)


def test_what_is_no_array_of_ours() -> None:
    with pytest.raises(TypeError, match=r"rows must be a NumPy or CuPy array, not builtins\.list"):
        OPERATION.version(rows=[1, 2])

    class Tensor:
        __cuda_array_interface__ = None

    with pytest.raises(TypeError, match=r"wrap it with cupy\.asarray"):
        OPERATION.version(rows=Tensor())


def test_a_stream_is_for_the_gpu() -> None:
    with pytest.raises(TypeError, match="stream= is for arrays on a GPU"):
        OPERATION.version(stream=object(), rows=HOST)
    assert OPERATION.version(stream=object(), rows=DEVICE) == "cuda"


def test_fronts_are_cheap_to_import() -> None:
    """The inference server imports them at start: its start and its memory must not pay for compilers."""
    fronts = ", ".join(["kernels.backend", "kernels.operations", *(f"kernels.{name}" for name in operations.names())])
    heavy = "[n for n in ('numba', 'cupy', 'llvmlite', 'onnxruntime') if n in sys.modules]"
    code = f"import sys, {fronts}; found = {heavy}; assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numba_with_nowhere_to_keep_its_code(tmp_path: Path) -> None:
    """As in a container whose files are read-only: it compiles into a folder of its own, and says nothing."""
    code = """
from numba.core import caching
locators = caching.CacheImpl._locator_classes
caching.CacheImpl._locator_classes = [locator for locator in locators if "UserProvided" in locator.__name__]
assert caching.CacheImpl._locator_classes
import numpy as np
from kernels.quantize_rows import quantize_rows
assert (quantize_rows(np.ones((2, 4), np.float32))[0] == 127).all()
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        assert list(tmp_path.glob("shoal-tmp-numba-*/**/*.nbi"))
        # The second process removes the folder that the first one left.
        assert len(list(tmp_path.glob("shoal-tmp-numba-*"))) == 1


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match="no operation 'resize_all'"):
        operations.warm_up("resize_all")
