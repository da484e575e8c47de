"""Tensors between the wire and NumPy: raw bytes become views without a copy, typed contents become arrays.

Formats: the Open Inference Protocol's `raw_input_contents` (little-endian, row-major; a BYTES element is a 4-byte
little-endian length and that many bytes) and `InferTensorContents`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from services.infer.calls.datatypes import Datatype
from services.infer.wording import written
from shoal.errors import InvalidArgument

# Model processes import this module and no protobuf.
if TYPE_CHECKING:
    from shoal.inference.v2.inference_pb2 import InferTensorContents

Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# No message can carry so many elements; what is beyond would only overflow something behind us, even when another
# dimension of 0 makes the tensor empty.
_MAX_ELEMENTS = 1 << 31

_LENGTH = struct.Struct("<I")


def count(shape: Sequence[int], what: str) -> int:
    """The number of elements of a tensor of `shape`; `what` opens the message of an error.

    Raises:
        InvalidArgument: a negative dimension, or more elements than any message can carry.
    """
    if any(dim < 0 for dim in shape):
        raise InvalidArgument(f"{what}: shape {written(shape)} has a negative dimension")
    if math.prod(dim for dim in shape if dim) > _MAX_ELEMENTS:
        raise InvalidArgument(f"{what}: shape {written(shape)} has more than {_MAX_ELEMENTS} elements")
    return math.prod(shape)


def from_raw(raw: bytes, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False) -> Tensor:
    """The tensor in `raw`: a read-only view of it, but for BYTES. `what` opens the message of an error.

    Raises:
        InvalidArgument: `raw` is not exactly a tensor of this datatype and shape.
    """
    elements = count(shape, what)
    if datatype.is_bytes:
        return _object_array(_split(raw, elements, what), shape, what, text=text)
    expected = elements * datatype.dtype.itemsize
    if len(raw) != expected:
        raise InvalidArgument(
            f"{what}: byte size mismatch: shape {written(shape)} of {datatype.name} is {expected} bytes, got {len(raw)}"
        )
    if datatype.name == "BOOL":
        bits = np.frombuffer(raw, np.uint8)
        if bits.size and bits.max() > 1:
            raise InvalidArgument(f"{what}: a BOOL element is the byte 0 or 1, got {int(bits.max())}")
    return np.frombuffer(raw, datatype.dtype).reshape(shape)


def _split(raw: bytes, elements: int, what: str) -> list[bytes]:
    # Every element has a length of 4 bytes: this also bounds the work by what was really sent.
    if elements * _LENGTH.size > len(raw):
        raise InvalidArgument(
            f"{what}: byte size mismatch: {elements} BYTES elements take at least {elements * _LENGTH.size} bytes with "
            f"their lengths, got {len(raw)}"
        )
    parts: list[bytes] = []
    at, end = 0, len(raw)
    unpack = _LENGTH.unpack_from
    for index in range(elements):
        if at + 4 > end:
            raise InvalidArgument(f"{what}: element {index} of {elements} has no length: the data ends at byte {end}")
        stop = at + 4 + unpack(raw, at)[0]
        if stop > end:
            raise InvalidArgument(
                f"{what}: element {index} says it has {stop - at - 4} bytes, but {end - at - 4} are left"
            )
        parts.append(raw[at + 4 : stop])
        at = stop
    if at != end:
        raise InvalidArgument(f"{what}: byte size mismatch: {end - at} bytes are left after {elements} BYTES elements")
    return parts


def from_contents(
    contents: InferTensorContents, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False
) -> Tensor:
    """The tensor in typed `contents`. `what` opens the message of an error.

    Raises:
        InvalidArgument: another field than the datatype's is filled, or the values are not exactly the tensor.
    """
    elements = count(shape, what)
    filled = [field.name for field, _ in contents.ListFields()]
    if not datatype.contents and (filled or elements):
        raise InvalidArgument(f"{what}: {datatype.name} has no typed contents: send raw_input_contents")
    if wrong := [name for name in filled if name != datatype.contents]:
        raise InvalidArgument(f"{what}: {datatype.name} belongs in {datatype.contents}, got {', '.join(wrong)}")
    values = getattr(contents, datatype.contents) if datatype.contents else ()
    if len(values) != elements:
        raise InvalidArgument(
            f"{what}: shape {written(shape)} has {elements} elements, {datatype.contents} has {len(values)}"
        )
    if datatype.is_bytes:
        return _object_array(list(values), shape, what, text=text)
    if datatype.contents in ("int_contents", "uint_contents") and elements:
        limits = np.iinfo(datatype.dtype.name)
        for value in (min(values), max(values)):
            if not limits.min <= value <= limits.max:
                raise InvalidArgument(f"{what}: {value} is not a {datatype.name} ({limits.min} to {limits.max})")
    return np.array(values, datatype.dtype).reshape(shape)


def _object_array(parts: Sequence[bytes], shape: Sequence[int], what: str, *, text: bool) -> Tensor:
    array = np.empty(len(parts), object)
    array[:] = _decoded(parts, what) if text else parts
    return array.reshape(shape)


def _decoded(parts: Sequence[bytes], what: str) -> list[str]:
    index = 0
    try:
        strings = []
        for index, part in enumerate(parts):  # noqa: B007 - named in the error.
            strings.append(part.decode())
        return strings
    except UnicodeDecodeError as err:
        raise InvalidArgument(f"{what}: this model's BYTES are text: element {index} is not UTF-8 ({err})") from err


def to_raw(tensor: Tensor, datatype: Datatype) -> bytes:
    """The bytes of `tensor` as the wire wants them: one copy."""
    if not datatype.is_bytes:
        return tensor.tobytes()
    parts: list[bytes] = []
    for element in tensor.reshape(-1):
        data = element.encode() if isinstance(element, str) else element
        parts.append(_LENGTH.pack(len(data)))
        parts.append(data)
    return b"".join(parts)


def size_bytes(tensor: Tensor) -> int:
    """What `tensor` weighs in a queue; for BYTES, what its elements weigh with a reference each."""
    if tensor.dtype != object:
        return tensor.nbytes
    return tensor.nbytes + sum(len(element) for element in tensor.reshape(-1))


def widened(bits: Tensor) -> Tensor:
    """BF16, given as 16-bit patterns, as FP32: the same values."""
    wide: Tensor = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide
