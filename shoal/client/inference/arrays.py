"""NumPy arrays as inputs of a request: the datatype of an array, and conversion to the datatype of a model's input.

bool BOOL   int8..int64 INT8..INT64   uint8..uint64 UINT8..UINT64   float16 FP16   float32 FP32   float64 FP64
text and bytes (object, str_, bytes_)  BYTES        BFloat16(uint16), ml_dtypes.bfloat16           BF16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shoal.errors import InvalidArgument
from shoal.oip import bfloat16
from shoal.oip.conversion import converted
from shoal.oip.datatypes import BY_NAME, Datatype, of_array
from shoal.oip.tensors import Array, to_raw

ArrayLike: TypeAlias = "Array | Sequence[Any] | BFloat16 | bool | int | float | str | bytes"
"""Types of an input: an array, or (nested) lists and scalars, which get the datatype of the model's input."""


@dataclass(frozen=True, eq=False)
class BFloat16:
    """bfloat16 values by their bits: marks a uint16 array as BF16."""

    bits: NDArray[np.uint16]

    @classmethod
    def of(cls, values: Any) -> BFloat16:
        """Round `values` (anything that becomes float32) to the nearest bfloat16, ties to even; NaN stays NaN."""
        return cls(bfloat16.to_bits(values))

    def float32(self) -> NDArray[np.float32]:
        """Return the same values as float32: exact."""
        return bfloat16.to_float32(self.bits)


@dataclass(frozen=True)
class Tensor:
    """Tensor in wire format."""

    datatype: str
    shape: tuple[int, ...]
    raw: bytes


def to_tensor(name: str, value: ArrayLike, datatype: str | None = None) -> Tensor:
    """Return the tensor of `value`, converted to `datatype` if that is set. Every element keeps its meaning.

    Raises:
        InvalidArgument: NumPy cannot make an array of `value`, the array's type has no datatype, or an element does not
            fit `datatype`.
    """
    if isinstance(value, BFloat16):
        array, natural = np.asarray(value.bits), BY_NAME["BF16"]
    else:
        array, natural = _array_of(name, value)
    target = natural
    if datatype is not None and datatype != natural.name:
        array, target = convert(name, array, datatype), BY_NAME[datatype]
    if not target.is_bytes:
        array = array.astype(target.dtype, copy=False)
    try:
        return Tensor(target.name, array.shape, to_raw(array, target))
    except TypeError as err:
        raise InvalidArgument(f"input {name!r}: {err}") from None


def is_exact(value: ArrayLike) -> bool:
    """Return True when `value` has a datatype of its own; lists and scalars take the model's datatype."""
    return isinstance(value, np.ndarray | np.generic | BFloat16) or hasattr(value, "__array__")


def _array_of(name: str, value: Any) -> tuple[Array, Datatype]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as err:
        raise InvalidArgument(
            f"input {name!r}: NumPy cannot make an array of the value ({err}): rows must have equal lengths"
        ) from err
    datatype = of_array(array)
    if datatype is None:
        known = "bool, int8 to int64, uint8 to uint64, float16, float32, float64, text or bytes"
        raise InvalidArgument(f"input {name!r}: dtype {array.dtype} has no datatype in the protocol: use {known}")
    return (array.view(np.uint16) if datatype.name == "BF16" else array), datatype


def convert(name: str, array: Array, datatype: str) -> Array:
    """Return `array` as the NumPy type that carries `datatype`.

    Raises:
        InvalidArgument: `datatype` is unknown, or cannot represent an element (1.5 as INT32, 300 as UINT8).
            Rounding of fractions to a narrower float is allowed; an overflow to infinity is not.
    """
    if datatype == "BYTES":
        return _as_text(name, array)
    if datatype not in BY_NAME:
        raise InvalidArgument(f"input {name!r}: no datatype {datatype!r}: use one of {', '.join(BY_NAME)}")
    if array.dtype.kind not in "biuf" and array.size:
        raise InvalidArgument(f"input {name!r}: expected {datatype}, got {array.dtype} ({_first(array)!r} ...)")
    made, kept = converted(array, BY_NAME[datatype])
    if kept is not None and not kept.all():
        index = np.argwhere(~np.atleast_1d(kept))[0]
        element = np.atleast_1d(array)[tuple(index)]
        raise InvalidArgument(f"input {name!r}: {element!r} at {index.tolist()} is not {datatype}")
    return made


def _as_text(name: str, array: Array) -> Array:
    if array.dtype.kind in "OSU" or not array.size:
        return array
    raise InvalidArgument(f"input {name!r}: expected BYTES (text or bytes), got {array.dtype} ({_first(array)!r} ...)")


def _first(array: Array) -> object:
    return array.reshape(-1)[0]
