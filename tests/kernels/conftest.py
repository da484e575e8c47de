"""Every version of an operation behind one door: the same tests run on all of them.

    reference        NumPy
    cpu              numba
    shim             the CUDA C++ source on the CPU, threads of a block from first to last
    shim-backward    the same from last to first: a missing barrier shows
    device           a GPU; skipped, and counted, where there is none

A test asks for `place`, and calls the public operation with `place.put(array)`. For operations whose GPU version is
numba.cuda, `tests/kernels/simulator` has the tests that run in the simulator, in a process of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels import backend, cuda_source
from kernels.cuda_source import CudaSource
from tests.kernels.shim.compiled import Shim

collect_ignore = ["simulator"]
PLACES = ("reference", "cpu", "shim", "shim-backward", pytest.param("device", marks=pytest.mark.gpu))


@dataclass
class Place:
    """Where a version takes its arrays."""

    name: str
    launches: list[str] = field(default_factory=list)
    """The kernels that the shim launched, in order."""

    def put(self, array: np.ndarray) -> Any:
        return importlib.import_module("cupy").asarray(array) if self.name == "device" else array

    def get(self, array: Any) -> np.ndarray:
        return array.get() if self.name == "device" else array


@pytest.fixture(scope="session")
def shims(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CudaSource, bool], Shim]:
    """The shim of a CUDA source, compiled once in a run."""
    folder = tmp_path_factory.mktemp("shim")
    found: dict[tuple[Path, bool], Shim] = {}

    def of(source: CudaSource, backward: bool) -> Shim:
        key = (source.path, backward)
        if key not in found:
            other = found.get((source.path, not backward))
            found[key] = Shim(source, folder, backward)
            if other is not None:
                found[key].__dict__["_library"] = other._library
        return found[key]

    return of


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, shims: Callable[..., Shim]) -> Place:
    """Operations called in the test run this version, whatever `KERNELS_BACKEND` says."""
    here = Place(request.param)
    version = "cuda" if here.name.startswith(("shim", "device")) else here.name
    if here.name.startswith("shim"):

        def launcher(source: CudaSource) -> Any:
            shim = shims(source, here.name == "shim-backward")

            def launch(kernel: str, *args: Any) -> None:
                shim.launch(kernel, *args)
                here.launches.append(kernel)

            return launch

        monkeypatch.setattr(cuda_source, "launcher", launcher)
        monkeypatch.setattr(CudaSource, "_launcher", property(cuda_source.launcher))
    if here.name != "device":
        monkeypatch.setattr(backend.Operation, "version", lambda self, stream=None, **arrays: self.load(version))
    return here


@pytest.fixture(autouse=True)
def _needs_a_device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not backend.device_available():
        pytest.skip("no GPU: tests marked gpu were not run")
