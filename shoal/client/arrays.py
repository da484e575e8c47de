"""NumPy arrays to and from the tensors of the inference protocol.

    bool BOOL   int8..int64 INT8..INT64   uint8..uint64 UINT8..UINT64   float16 FP16   float32 FP32   float64 FP64
    text and bytes (object, str_, bytes_)  BYTES        BFloat16(uint16), ml_dtypes.bfloat16           BF16

Elements travel as raw bytes, little-endian and row-major; a BYTES element is a 4-byte little-endian length and that
many bytes (https://github.com/kserve/open-inference-protocol, "Raw Contents"). Answers are read from raw bytes and from
typed contents alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shoal.datatypes import CONTENTS, DTYPES
from shoal.errors import DataLoss, InvalidArgument
from shoal.inference.v2 import inference_pb2 as oip

Array: TypeAlias = NDArray[Any]
ArrayLike: TypeAlias = "Array | Sequence[Any] | BFloat16 | bool | int | float | str | bytes"
"""What an input may be: an array, or (nested) lists and scalars, which take the datatype that the model asks for."""

_DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items() if datatype != "BF16"}


@dataclass(frozen=True, eq=False)
class BFloat16:
    """bfloat16 values by their bits: says that a uint16 array is BF16 and not UINT16."""

    bits: NDArray[np.uint16]

    @classmethod
    def of(cls, values: Any) -> BFloat16:
        """Rounds `values` (anything that becomes float32) to the nearest bfloat16, ties to even; NaN stays NaN."""
        wide = np.ascontiguousarray(values, dtype="<f4")
        raw = wide.view("<u4").astype(np.uint64)
        rounded = ((raw + 0x7FFF + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")
        # A NaN whose payload lies in the lower half would round to infinity: keep it a (quiet) NaN.
        quiet = ((raw >> np.uint64(16)) | np.uint64(0x40)).astype("<u2")
        return cls(np.where(np.isnan(wide), quiet, rounded).reshape(np.shape(values)))

    def float32(self) -> NDArray[np.float32]:
        """The same values as float32: exact."""
        wide = np.asarray(self.bits, dtype="<u2").astype("<u4") << np.uint32(16)
        return np.asarray(wide).view("<f4").astype(np.float32)


@dataclass(frozen=True)
class Tensor:
    """A tensor as the wire has it."""

    datatype: str
    shape: tuple[int, ...]
    raw: bytes


def to_tensor(name: str, value: ArrayLike, datatype: str | None = None) -> Tensor:
    """The tensor of `value`; `datatype` converts it first, where every element keeps its meaning.

    Raises:
        InvalidArgument: NumPy makes no array of it, its type has no datatype, or an element does not fit `datatype`.
    """
    if isinstance(value, BFloat16):
        array, natural = np.asarray(value.bits), "BF16"
    else:
        array, natural = _array_of(name, value)
    if datatype is not None and datatype != natural:
        array = convert(name, array, datatype)
    wanted = datatype or natural
    raw = _pack(name, array) if wanted == "BYTES" else array.astype(DTYPES[wanted], copy=False).tobytes()
    return Tensor(wanted, array.shape, raw)


def is_exact(value: ArrayLike) -> bool:
    """True when `value` says itself which datatype it has; lists and scalars need the model's word."""
    return isinstance(value, np.ndarray | np.generic | BFloat16) or hasattr(value, "__array__")


def _array_of(name: str, value: Any) -> tuple[Array, str]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as err:
        raise InvalidArgument(
            f"input {name!r}: NumPy makes no array of it ({err}): rows must have equal lengths"
        ) from err
    if array.dtype.name == "bfloat16":  # ml_dtypes', which need not be installed.
        return array.view(np.uint16), "BF16"
    return array, _natural(name, array)


def _natural(name: str, array: Array) -> str:
    if array.dtype.kind in "OSU":
        return "BYTES"
    datatype = _DATATYPES.get(array.dtype.newbyteorder("<"))
    if datatype is None:
        known = "bool, int8 to int64, uint8 to uint64, float16, float32, float64, text or bytes"
        raise InvalidArgument(f"input {name!r}: dtype {array.dtype} has no datatype in the protocol: use {known}")
    return datatype


def convert(name: str, array: Array, datatype: str) -> Array:
    """`array` as the NumPy type that carries `datatype`.

    Raises:
        InvalidArgument: `datatype` is unknown, or an element has no equal there (1.5 as INT32, 300 as UINT8).
            Rounding of fractions to a narrower float is no loss; what becomes infinite is.
    """
    if datatype == "BYTES":
        return _as_text(name, array)
    if datatype not in DTYPES:
        raise InvalidArgument(f"input {name!r}: no datatype {datatype!r}: use one of {', '.join(DTYPES)}, BYTES")
    if array.dtype.kind not in "biuf" and array.size:
        raise InvalidArgument(f"input {name!r}: expected {datatype}, got {array.dtype} ({_first(array)!r} ...)")
    if datatype == "BF16":
        return BFloat16.of(array).bits
    target = DTYPES[datatype]
    with np.errstate(all="ignore"):
        converted = array.astype(target)
        if not array.size or (target.kind == "b" and array.dtype.kind == "b"):
            return converted
        kept = _kept(array, converted)
    if not kept.all():
        place = np.argwhere(~np.atleast_1d(kept))[0]
        element = np.atleast_1d(array)[tuple(place)]
        raise InvalidArgument(f"input {name!r}: {element!r} at {place.tolist()} is not {datatype}")
    return converted


def _kept(array: Array, converted: Array) -> NDArray[np.bool_]:
    """Where the conversion kept the element's meaning."""
    if converted.dtype.kind == "f":
        finite = np.isfinite(array) if array.dtype.kind == "f" else np.ones(array.shape, dtype=np.bool_)
        return np.asarray(~finite | np.isfinite(converted))
    if array.dtype.kind == "f":
        array = array.astype(np.float64)  # A narrow float would make infinities of the limits below.
    same = np.asarray(converted.astype(array.dtype) == array)
    if converted.dtype.kind in "iu" and array.dtype.kind in "iu":
        same &= np.asarray((converted < 0) == (array < 0))  # A sign that wraps around comes back equal.
    if converted.dtype.kind in "iu" and array.dtype.kind == "f":
        limits = np.iinfo(converted.dtype)
        # float(max) rounds up to a power of two that no integer type holds, hence `<`.
        same &= np.asarray((array >= float(limits.min)) & (array < float(limits.max) + 1))
    return same


def _as_text(name: str, array: Array) -> Array:
    if array.dtype.kind in "OSU" or not array.size:
        return array
    raise InvalidArgument(f"input {name!r}: expected BYTES (text or bytes), got {array.dtype} ({_first(array)!r} ...)")


def _first(array: Array) -> object:
    return array.reshape(-1)[0]


def _pack(name: str, array: Array) -> bytes:
    parts: list[bytes] = []
    for index, element in enumerate(array.reshape(-1).tolist()):
        if isinstance(element, str):
            data = element.encode()
        elif isinstance(element, bytes | bytearray | memoryview):
            data = bytes(element)
        else:
            kind = type(element).__name__
            raise InvalidArgument(f"input {name!r}: element {index} is {kind}: a BYTES tensor holds text or bytes")
        parts += (len(data).to_bytes(4, "little"), data)
    return b"".join(parts)


def from_tensor(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """The array of a tensor; BYTES becomes an object array of `bytes`, BF16 a uint16 array of its bits.

    Raises:
        DataLoss: the bytes do not fit datatype and shape.
    """
    _check_shape(name, shape)
    if datatype == "BYTES":
        elements = _unpack(name, raw)
        _check_count(name, datatype, shape, len(elements))
        return _objects(elements).reshape(tuple(shape))
    dtype = _dtype(name, datatype)
    need = math.prod(shape) * dtype.itemsize
    if need != len(raw):
        raise DataLoss(f"output {name!r}: {datatype} {list(shape)} takes {need} bytes, the answer has {len(raw)}")
    return np.frombuffer(raw, dtype).reshape(tuple(shape)).copy()


def from_contents(name: str, datatype: str, shape: Sequence[int], contents: oip.InferTensorContents) -> Array:
    """The array of a tensor whose elements came in typed contents.

    Raises:
        DataLoss: the elements do not fit datatype and shape, or lie in a field that is not the datatype's.
    """
    _check_shape(name, shape)
    field = CONTENTS.get(datatype)
    if field is None:
        raise DataLoss(f"output {name!r}: {datatype} has no typed contents in the protocol")
    elements: Sequence[Any] = getattr(contents, field)
    _check_count(name, datatype, shape, len(elements))
    if datatype == "BYTES":
        return _objects(list(elements)).reshape(tuple(shape))
    try:
        return np.array(list(elements), dtype=DTYPES[datatype]).reshape(tuple(shape))
    except OverflowError as err:
        raise DataLoss(f"output {name!r}: an element is beyond {datatype}") from err


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise DataLoss(f"output {name!r}: unknown datatype {datatype!r}")
    return DTYPES[datatype]


def _check_shape(name: str, shape: Sequence[int]) -> None:
    if any(size < 0 for size in shape):
        raise DataLoss(f"output {name!r}: the answer has the shape {list(shape)}")


def _check_count(name: str, datatype: str, shape: Sequence[int], count: int) -> None:
    if count != math.prod(shape):
        raise DataLoss(f"output {name!r}: {datatype} {list(shape)} has {math.prod(shape)} elements, the answer {count}")


def _objects(elements: list[bytes]) -> Array:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def _unpack(name: str, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        if start > len(raw) or at > len(raw):
            raise DataLoss(f"output {name!r}: BYTES element {len(elements)} ends beyond the answer's {len(raw)} bytes")
        elements.append(raw[start:at])
    return elements
