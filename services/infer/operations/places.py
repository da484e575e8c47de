"""Where an operation computes: on the host, or on a GPU. The arrays' place says which version of a kernel runs.

    host arrays ──put──> kernel ──get──> host arrays

Between two steps on one GPU the arrays could stay there; they do not yet: `get` and `put` are where that will be.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from services.infer.calls.tensors import Tensor
from shoal.errors import FailedPrecondition


class Place(Protocol):
    """The host, or a GPU."""

    @property
    def gpus(self) -> tuple[int, ...]: ...

    def put(self, array: Tensor) -> Any:
        """The array where the kernel wants it."""

    def get(self, array: Any) -> Tensor:
        """A result on the host."""


class Host:
    """Nothing is copied."""

    gpus: tuple[int, ...] = ()

    def put(self, array: Tensor) -> Any:
        return array

    def get(self, array: Any) -> Tensor:
        result: Tensor = array
        return result


class Gpu:
    """A CUDA device, by way of CuPy."""

    def __init__(self, number: int) -> None:
        """Raises FailedPrecondition when CuPy is missing or broken."""
        try:
            self._cupy = importlib.import_module("cupy")
        except ImportError as err:
            raise FailedPrecondition(
                "instance_group: KIND_GPU needs CuPy: pip install 'shoal[cuda13]' (or cuda12)"
            ) from err
        self.gpus = (number,)

    def put(self, array: Tensor) -> Any:
        with self._cupy.cuda.Device(self.gpus[0]):
            return self._cupy.asarray(array)

    def get(self, array: Any) -> Tensor:
        with self._cupy.cuda.Device(self.gpus[0]):
            result: Tensor = self._cupy.asnumpy(array)
            return result
