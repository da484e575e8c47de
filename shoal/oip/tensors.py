"""Codec of Open Inference Protocol tensors: raw and typed contents to NumPy arrays, and arrays to raw contents.

    raw contents      elements little-endian and row-major; a BYTES element is a 4-byte little-endian length and that
                      many bytes (https://github.com/kserve/open-inference-protocol, "Raw Contents")
    typed contents    one field of InferTensorContents for each family of datatypes; FP16 and BF16 have none

Every reader takes `what`, which opens the message of an error, and `error`, the class that it raises: a server rejects
a request with InvalidArgument, a client a response with DataLoss. This module imports no protobuf, because model
processes use it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.oip.datatypes import Datatype, find
from shoal.oip.limits import MAX_DIMS

if TYPE_CHECKING:
    from shoal.inference.v2 import inference_pb2 as pb

    _WireTensors: TypeAlias = (
        Sequence[pb.ModelInferRequest.InferInputTensor] | Sequence[pb.ModelInferResponse.InferOutputTensor]
    )

Array: TypeAlias = NDArray[Any]
Error: TypeAlias = Callable[[str], Exception]
R = TypeVar("R")

# No message can carry so many elements. A larger shape would overflow NumPy, even when a dimension of 0 makes the
# tensor empty.
_MAX_ELEMENTS = 1 << 31

# As many dimensions as a message of an error shows.
_SHOWN_DIMS = 16

_LENGTH = struct.Struct("<I")

# Smaller integers travel as 32-bit ones.
_WIRE_DTYPES = {"int_contents": np.dtype("<i4"), "uint_contents": np.dtype("<u4")}

# BYTES elements between two yields of a function that works in steps: 0.5 ms.
_STEP_ELEMENTS = 2_048

# Iterating over so few elements takes less than the 5 us that NumPy needs to find the buffer of a protobuf field.
_FEW_ELEMENTS = 64


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape for a message: `[-1,4]`; its first 16 dimensions."""
    more = f",... ({len(shape)} dimensions)" if len(shape) > _SHOWN_DIMS else ""
    return "[" + ",".join(str(dim) for dim in shape[:_SHOWN_DIMS]) + more + "]"


def count_elements(shape: Sequence[int], what: str, error: Error) -> int:
    """Return the number of elements of a tensor of `shape`.

    Raises:
        error: a negative dimension, too many dimensions, or more elements than any message can carry.
    """
    if len(shape) > MAX_DIMS:
        raise error(f"{what}: shape {shape_text(shape)} has more than {MAX_DIMS} dimensions")
    if shape and min(shape) < 0:
        raise error(f"{what}: shape {shape_text(shape)} has a negative dimension")
    elements = math.prod(shape)
    if elements > _MAX_ELEMENTS or (not elements and math.prod(dim for dim in shape if dim) > _MAX_ELEMENTS):
        raise error(f"{what}: shape {shape_text(shape)} has more than {_MAX_ELEMENTS} elements")
    return elements


def read_tensor(tensors: _WireTensors, raw: Sequence[bytes], index: int, role: str, error: Error) -> tuple[str, Array]:
    """Return the name and the array of tensor `index` of a message.

    Args:
        tensors: all inputs of a request, or all outputs of a response.
        raw: the message's raw contents; empty when the tensors have typed contents.
        role: "input" or "output", for messages of errors.

    Raises:
        error: the data does not fit the tensor's datatype and shape.
    """
    tensor = tensors[index]
    what = f"{role} {tensor.name!r}"
    datatype = find(tensor.datatype, what, error)
    if not raw:
        return tensor.name, from_contents(tensor.contents, datatype, tensor.shape, what, error)
    if len(raw) != len(tensors):
        raise error(f"{what}: the message has {len(tensors)} {role}s with {len(raw)} raw contents")
    return tensor.name, from_raw(raw[index], datatype, tensor.shape, what, error)


def from_raw(raw: bytes, datatype: Datatype, shape: Sequence[int], what: str, error: Error) -> Array:
    """Return the tensor in raw contents: a read-only view of `raw`, except for BYTES.

    Raises:
        error: `raw` is not exactly a tensor of this datatype and shape.
    """
    # Several passes over a tuple are faster than one over a protobuf field.
    shape = tuple(shape)
    elements = count_elements(shape, what, error)
    if datatype.is_bytes:
        return object_array(split_bytes(raw, elements, what, error), shape)
    dtype = datatype.dtype
    expected = elements * dtype.itemsize
    if len(raw) != expected:
        raise error(
            f"{what}: byte size mismatch: shape {shape_text(shape)} of {datatype.name} is {expected} bytes, "
            f"got {len(raw)}"
        )
    return np.frombuffer(raw, dtype).reshape(shape)


def from_contents(
    contents: pb.InferTensorContents, datatype: Datatype, shape: Sequence[int], what: str, error: Error
) -> Array:
    """Return the tensor in typed contents.

    Raises:
        error: another field than the datatype's is filled, or the values are not exactly the tensor.
    """
    shape = tuple(shape)
    elements = count_elements(shape, what, error)
    filled = [field.name for field, _ in contents.ListFields()]
    if not datatype.contents and not filled and not elements:
        return np.empty(shape, datatype.dtype)
    _check_field(filled, datatype, what, error)
    values = getattr(contents, datatype.contents)
    _check_count(len(values), elements, datatype, shape, what, error)
    if datatype.is_bytes:
        return object_array(list(values), shape)
    wire = _WIRE_DTYPES.get(datatype.contents, datatype.dtype)
    array = np.fromiter(values, wire, elements) if elements < _FEW_ELEMENTS else np.array(values, wire)
    if wire == datatype.dtype:
        return array.reshape(shape)
    _check_range(array, datatype, what, error)
    return array.astype(datatype.dtype).reshape(shape)


def from_packed(
    field: str, data: bytes | memoryview, datatype: Datatype, shape: Sequence[int], what: str, error: Error
) -> Array:
    """Return the tensor in typed contents, a view of `data`: the bytes of `field`, fp32_contents or fp64_contents.

    Raises as `from_contents` does.
    """
    shape = tuple(shape)
    elements = count_elements(shape, what, error)
    _check_field([field], datatype, what, error)
    _check_count(len(data) // datatype.dtype.itemsize, elements, datatype, shape, what, error)
    return np.frombuffer(data, datatype.dtype).reshape(shape)


def _check_field(filled: Sequence[str], datatype: Datatype, what: str, error: Error) -> None:
    if not datatype.contents:
        raise error(f"{what}: {datatype.name} has no typed contents: use raw contents")
    if wrong := [name for name in filled if name != datatype.contents]:
        raise error(f"{what}: {datatype.name} belongs in {datatype.contents}, got {', '.join(wrong)}")


def _check_count(count: int, elements: int, datatype: Datatype, shape: Sequence[int], what: str, error: Error) -> None:
    if count != elements:
        raise error(f"{what}: shape {shape_text(shape)} has {elements} elements, {datatype.contents} has {count}")


def _check_range(array: Array, datatype: Datatype, what: str, error: Error) -> None:
    """Reject integers beyond `datatype`: INT8, INT16, UINT8 and UINT16 travel as 32-bit integers."""
    if not array.size:
        return
    limits = np.iinfo(datatype.dtype.name)
    for value in (array.min(), array.max()):
        if not limits.min <= value <= limits.max:
            raise error(f"{what}: {value} is not a {datatype.name} ({limits.min} to {limits.max})")


def completed(steps: Generator[Any, None, R]) -> R:
    """Return the result of work that yields after each step, or yields a function to be called before the next one.

    Raises what a step or such a function raises.
    """
    try:
        while True:
            if (asked := next(steps)) is not None:
                asked()
    except StopIteration as end:
        result: R = end.value
        return result


def to_raw(array: Array, datatype: Datatype) -> bytes:
    """Return the raw contents of `array`, which has the NumPy type of `datatype`: one copy.

    Raises:
        TypeError: an element of a BYTES tensor is neither text nor bytes.
    """
    return completed(to_raw_steps(array, datatype))


def to_raw_steps(array: Array, datatype: Datatype) -> Generator[None, None, bytes]:
    """Return the raw contents as `to_raw` does; of BYTES in steps."""
    if not datatype.is_bytes:
        return array.tobytes()
    elements, packed = array.reshape(-1), []
    for at in range(0, elements.size, _STEP_ELEMENTS):
        packed.append(pack_bytes(elements[at : at + _STEP_ELEMENTS].tolist()))
        yield
    return b"".join(packed)


def pack_bytes(elements: Iterable[Any]) -> bytes:
    """Return BYTES elements (`bytes`-like, or `str` as UTF-8) as raw contents.

    Raises:
        TypeError: an element is neither text nor bytes, or text that UTF-8 cannot have.
    """
    parts: list[Any] = []
    pack = _LENGTH.pack
    try:
        for element in elements:
            # Exact types first: `isinstance` and a call for each element would take half of the time again.
            if type(element) is bytes:
                data = element
            elif type(element) is str:
                data = element.encode()
            else:
                data = _as_bytes(element, len(parts) // 2)
            parts.append(pack(len(data)))
            parts.append(data)
    except UnicodeEncodeError as err:
        raise TypeError(f"element {len(parts) // 2} is text that UTF-8 cannot have: {err.reason}; use bytes") from err
    return b"".join(parts)


def _as_bytes(element: object, index: int) -> bytes:
    if isinstance(element, str):
        return element.encode()
    if isinstance(element, bytes | bytearray | memoryview):
        return bytes(element)
    raise TypeError(f"element {index} is {type(element).__name__}: a BYTES tensor holds text or bytes")


def split_bytes(raw: bytes | memoryview, elements: int, what: str, error: Error) -> list[bytes]:
    """Return the BYTES elements in raw contents.

    Raises:
        error: `raw` is not exactly so many elements.
    """
    return completed(split_bytes_steps(raw, elements, what, error))


def split_bytes_steps(
    raw: bytes | memoryview, elements: int, what: str, error: Error
) -> Generator[None, None, list[bytes]]:
    """Return the BYTES elements as `split_bytes` does, in steps."""
    # Every element has a length of 4 bytes: this bounds the work by the bytes that were sent.
    if elements * _LENGTH.size > len(raw):
        raise error(
            f"{what}: byte size mismatch: {elements} BYTES elements take at least {elements * _LENGTH.size} bytes with "
            f"their lengths, got {len(raw)}"
        )
    parts: list[Any] = []
    at, end = 0, len(raw)
    unpack = _LENGTH.unpack_from
    # One by one: a view takes four times the memory of a short element.
    is_view = not isinstance(raw, bytes)
    for first in range(0, elements, _STEP_ELEMENTS):
        for index in range(first, min(first + _STEP_ELEMENTS, elements)):
            start = at + 4
            if start > end:
                raise error(f"{what}: element {index} of {elements} has no length: the data ends at byte {end}")
            (size,) = unpack(raw, at)
            at = start + size
            if at > end:
                raise error(f"{what}: element {index} says it has {size} bytes, but {end - start} are left")
            part = raw[start:at]
            parts.append(bytes(part) if is_view else part)
        yield
    if at != end:
        raise error(f"{what}: byte size mismatch: {end - at} bytes are left after {elements} BYTES elements")
    return parts


def object_array(elements: Sequence[Any], shape: Sequence[int]) -> Array:
    """Return an object array of `shape` that holds `elements`."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)
