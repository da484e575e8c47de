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
    from shoal.inference.v2.inference_pb2 import InferTensorContents

Tensor: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


def from_raw(raw: bytes, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False) -> Tensor:
    """Return the tensor in raw contents: a read-only view of `raw`, except for BYTES.

    Args:
        what: opens the message of an error.
        text: BYTES elements must be UTF-8, and become `str`.

    Raises:
        InvalidArgument: `raw` is not exactly a tensor of this datatype and shape.
    """
    tensor = codec.from_raw(raw, datatype, shape, what, InvalidArgument)
    if datatype.name == "BOOL":
        bits = tensor.view(np.uint8)
        if bits.size and bits.max() > 1:
            raise InvalidArgument(f"{what}: a BOOL element is the byte 0 or 1, got {int(bits.max())}")
    return _decoded(tensor, what) if text and datatype.is_bytes else tensor


def from_contents(
    contents: InferTensorContents, datatype: Datatype, shape: Sequence[int], what: str, *, text: bool = False
) -> Tensor:
    """Return the tensor in typed contents; the arguments are those of `from_raw`.

    Raises:
        InvalidArgument: another field than the datatype's is filled, or the values are not exactly the tensor.
    """
    tensor = codec.from_contents(contents, datatype, shape, what, InvalidArgument)
    return _decoded(tensor, what) if text and datatype.is_bytes else tensor


def _decoded(tensor: Tensor, what: str) -> Tensor:
    index = 0
    try:
        strings = []
        for index, element in enumerate(tensor.reshape(-1).tolist()):  # noqa: B007 - named in the error.
            strings.append(element.decode())
    except UnicodeDecodeError as err:
        raise InvalidArgument(f"{what}: this model's BYTES are text: element {index} is not UTF-8 ({err})") from err
    return codec.object_array(strings, tensor.shape)


def size_bytes(tensor: Tensor) -> int:
    """Return the size of `tensor` in a queue; for BYTES, that of its elements with a reference each."""
    if tensor.dtype != object:
        return tensor.nbytes
    return tensor.nbytes + sum(len(element) for element in tensor.reshape(-1))
