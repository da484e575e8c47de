"""Tensors of a request: read by the codec of `shoal.oip`, then checked by the server's rules for BOOL and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from shoal.errors import InvalidArgument
from shoal.oip import tensors as codec
from shoal.oip.datatypes import Datatype

# Model processes import this module, and no protobuf.
if TYPE_CHECKING:
    from mesh.rpc.heavy_work import Steps
    from shoal.inference.v2.inference_pb2 import InferTensorContents

Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# BYTES elements of a step: 0.2 ms.
_STEP_ELEMENTS = 4_096

# An element of BYTES in a run: Python's objects, and the runtime's strings, of an input and of an output. A batch of
# 64 MiB has 335,000 of them, of which ONNX Runtime makes strings in 10 to 40 ms without a pause.
_RUN_BYTES = 192

# NumPy copies fewer numbers in a millisecond.
_MANY_NUMBERS = 1 << 18


def from_raw(raw: bytes, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False) -> Tensor:
    """Return the tensor in raw contents: a read-only view of `raw`, except for BYTES.

    Args:
        what: opens the message of an error.
        text: BYTES elements must be UTF-8, and become `str`.

    Raises:
        InvalidArgument: `raw` is not exactly a tensor of this datatype and shape.
    """
    return codec.completed(from_raw_steps(raw, datatype, shape, what, text=text))


def from_raw_steps(
    raw: bytes, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False
) -> Steps[Tensor]:
    """Return the tensor as `from_raw` does; of BYTES in steps."""
    if datatype.is_bytes:
        shape = tuple(shape)
        elements = codec.count_elements(shape, what, InvalidArgument)
        parts = yield from codec.split_bytes_steps(raw, elements, what, InvalidArgument)
        return (yield from _object_array(parts, shape, what, text=text))
    tensor = codec.from_raw(raw, datatype, shape, what, InvalidArgument)
    if datatype.name == "BOOL":
        bits = tensor.view(np.uint8)
        if bits.size and bits.max() > 1:
            raise InvalidArgument(f"{what}: a BOOL element is the byte 0 or 1, got {int(bits.max())}")
    return tensor


def from_contents(
    contents: InferTensorContents, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False
) -> Tensor:
    """Return the tensor in typed contents; the arguments are those of `from_raw`.

    Raises:
        InvalidArgument: another field than the datatype's is filled, or the values are not exactly the tensor.
    """
    return codec.completed(from_contents_steps(contents, datatype, shape, what, text=text))


def from_contents_steps(
    contents: InferTensorContents, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False
) -> Steps[Tensor]:
    """Return the tensor as `from_contents` does; many numbers in a thread, and text in steps."""
    found: list[Tensor] = []

    def read() -> None:
        found.append(codec.from_contents(contents, datatype, shape, what, InvalidArgument))

    if not datatype.is_bytes and codec.count_elements(shape, what, InvalidArgument) > _MANY_NUMBERS:
        yield read
    else:
        read()
        yield
    (tensor,) = found
    if not text or not datatype.is_bytes:
        return tensor
    return (yield from _object_array(tensor.reshape(-1).tolist(), tensor.shape, what, text=True))


def from_packed(field: str, data: memoryview, datatype: Datatype, shape: Sequence[int], what: str) -> Tensor:
    """Return the tensor in typed contents of which only `field` is filled, with packed numbers: a view of `data`.

    Raises as `from_contents` does.
    """
    return codec.from_packed(field, data, datatype, shape, what, InvalidArgument)


def _object_array(elements: list[Any], shape: Sequence[int], what: str, *, text: bool) -> Steps[Tensor]:
    """Return the array of BYTES elements; `text`: as `str`."""
    array = np.empty(len(elements), object)
    for first in range(0, len(elements), _STEP_ELEMENTS):
        some = elements[first : first + _STEP_ELEMENTS]
        array[first : first + _STEP_ELEMENTS] = _texts(some, first, what) if text else some
        yield
    return array.reshape(shape)


def _texts(elements: Sequence[bytes], first: int, what: str) -> list[str]:
    index = first
    texts = []
    try:
        for index, element in enumerate(elements, first):  # noqa: B007 - named in the error.
            texts.append(element.decode())
    except UnicodeDecodeError as err:
        raise InvalidArgument(f"{what}: this model's BYTES are text: element {index} is not UTF-8 ({err})") from err
    return texts


def size_bytes(tensor: Tensor) -> int:
    """Return the size of `tensor` in a queue and in a batch; for BYTES, with the memory that a run takes for each."""
    size = data_bytes(tensor)
    return size if tensor.dtype != object else size + _RUN_BYTES * tensor.size


def data_bytes(tensor: Tensor) -> int:
    """Return the bytes of `tensor`; for BYTES, those of its elements with a reference each."""
    if tensor.dtype != object:
        return tensor.nbytes
    return tensor.nbytes + sum(map(len, tensor.reshape(-1).tolist()))
