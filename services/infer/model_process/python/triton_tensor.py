"""`pb_utils.Tensor`: a named array."""

from __future__ import annotations

from typing import Any

import numpy as np

from services.infer.model_process import payload
from services.infer.model_process.payload import Tensor, TensorPart
from services.infer.model_process.python.triton_types import TritonModelException
from shoal.oip.datatypes import BY_NAME, of_array


class TritonTensor:
    """`pb_utils.Tensor`: a named array, always in CPU memory."""

    def __init__(self, name: str, array: Any, datatype: str = "") -> None:
        """`datatype`: the protocol's name, for arrays whose NumPy type is ambiguous (BF16)."""
        if not isinstance(array, np.ndarray | np.generic):
            raise TritonModelException(f"tensor '{name}' is a {type(array).__name__}: expected a NumPy array")
        self._name, self._array = str(name), np.asarray(array)
        found = BY_NAME.get(datatype) or of_array(self._array)
        if found is None:
            raise TritonModelException(f"tensor '{name}' is {self._array.dtype}, which the protocol does not support")
        self._datatype = found

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Tensor:
        return self._array

    def triton_dtype(self) -> int:
        return self._datatype.number

    def shape(self) -> list[int]:
        return list(self._array.shape)

    def is_cpu(self) -> bool:
        return True

    def to_dlpack(self) -> Any:
        """Return a DLPack capsule."""
        return self._array.__dlpack__()

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> TritonTensor:
        """Return a tensor made from an object with `__dlpack__`, or from a DLPack capsule."""
        if not hasattr(tensor, "__dlpack__"):
            tensor = _Capsule(tensor)
        try:
            return TritonTensor(name, np.from_dlpack(tensor))
        except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as err:
            raise TritonModelException(f"tensor '{name}' cannot be read from DLPack: {err}") from err

    def part(self) -> TensorPart:
        """Return the tensor in the form in which the server receives it.

        Raises:
            TypeError: an element of a BYTES tensor is neither bytes nor text.
        """
        return payload.part(self._name, self._datatype.name, [self._array])


class _Capsule:
    """A DLPack capsule with the methods that NumPy needs."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        # kDLCPU, device 0.
        return 1, 0
