"""Tensors of the inference protocol on the wire, to and from arrays.

Raw contents: elements little-endian and row-major; before each BYTES element its length, in four bytes
(https://github.com/kserve/open-inference-protocol, "Raw Contents"). Answers are read from typed contents too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shoal.datatypes import CONTENTS, DTYPES
from shoal.errors import DataLoss
from shoal.inference.v2 import inference_pb2 as oip

Array: TypeAlias = NDArray[Any]

_LENGTH_BYTES = 4


def packed(elements: Iterable[bytes]) -> bytes:
    """BYTES elements as raw contents have them."""
    parts: list[bytes] = []
    for element in elements:
        parts += (len(element).to_bytes(_LENGTH_BYTES, "little"), element)
    return b"".join(parts)


def output_of(response: oip.ModelInferResponse, index: int) -> Array:
    """Output `index` of an answer, in its shape: BYTES as objects, BF16 by its bits (uint16).

    Raises:
        DataLoss: the elements are not what datatype and shape say.
    """
    raw, tensor = response.raw_output_contents, response.outputs[index]
    if raw and len(raw) != len(response.outputs):
        raise DataLoss(f"the model answered {len(response.outputs)} outputs with {len(raw)} contents")
    what, shape = f"output {tensor.name!r}", tuple(tensor.shape)
    if min(shape, default=0) < 0:
        raise DataLoss(f"{what}: the answer has the shape {list(shape)}")
    flat = _of_raw(what, tensor.datatype, raw[index]) if raw else _of_contents(what, tensor.datatype, tensor.contents)
    if len(flat) != math.prod(shape):
        raise DataLoss(f"{what}: {tensor.datatype} {list(shape)} has {math.prod(shape)} elements, got {len(flat)}")
    return flat.reshape(shape)


def _of_raw(what: str, datatype: str, raw: bytes) -> Array:
    if datatype == "BYTES":
        return _objects(_unpacked(what, raw))
    if (dtype := DTYPES.get(datatype)) is None:
        raise DataLoss(f"{what}: unknown datatype {datatype[:40]!r}")
    if len(raw) % dtype.itemsize:
        raise DataLoss(f"{what}: {len(raw)} bytes, and an element of {datatype} has {dtype.itemsize}")
    return np.frombuffer(raw, dtype)


def _of_contents(what: str, datatype: str, contents: oip.InferTensorContents) -> Array:
    if (field := CONTENTS.get(datatype)) is None:
        raise DataLoss(f"{what}: {datatype[:40]!r} has no typed contents in the protocol")
    elements = list(getattr(contents, field))
    if datatype == "BYTES":
        return _objects(elements)
    try:
        return np.array(elements, DTYPES[datatype])
    except OverflowError as err:
        raise DataLoss(f"{what}: an element is beyond {datatype}") from err


def _objects(elements: Sequence[bytes]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def _unpacked(what: str, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(raw[at:start], "little")
        if start > len(raw) or at > len(raw):
            raise DataLoss(f"{what}: BYTES element {len(elements)} ends beyond the tensor's {len(raw)} bytes")
        elements.append(raw[start:at])
    return elements
