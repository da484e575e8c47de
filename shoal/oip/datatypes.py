"""Table of the datatypes of the Open Inference Protocol.

Source: https://github.com/kserve/open-inference-protocol, "Tensor Data Types" and InferTensorContents.

NumPy has no bfloat16: a BF16 tensor is carried as the 16 bits of each element (`uint16`). A BYTES tensor is an object
array whose elements are `bytes`, or `str` for a runtime whose strings are text. This module imports no protobuf,
because model processes use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Datatype:
    """One datatype."""

    name: str
    """On the wire: `FP32`."""
    number: int
    """In a model's configuration: the number of TYPE_FP32."""
    dtype: np.dtype[Any]
    """In memory, little-endian as on the wire."""
    contents: str
    """The field of InferTensorContents that carries it; empty where only raw contents can."""

    @property
    def is_bytes(self) -> bool:
        return self.name == "BYTES"

    @property
    def config_name(self) -> str:
        """In a model's configuration: `TYPE_FP32`."""
        return "TYPE_STRING" if self.is_bytes else f"TYPE_{self.name}"


TABLE = (
    Datatype("BOOL", 1, np.dtype("?"), "bool_contents"),
    Datatype("UINT8", 2, np.dtype("<u1"), "uint_contents"),
    Datatype("UINT16", 3, np.dtype("<u2"), "uint_contents"),
    Datatype("UINT32", 4, np.dtype("<u4"), "uint_contents"),
    Datatype("UINT64", 5, np.dtype("<u8"), "uint64_contents"),
    Datatype("INT8", 6, np.dtype("<i1"), "int_contents"),
    Datatype("INT16", 7, np.dtype("<i2"), "int_contents"),
    Datatype("INT32", 8, np.dtype("<i4"), "int_contents"),
    Datatype("INT64", 9, np.dtype("<i8"), "int64_contents"),
    Datatype("FP16", 10, np.dtype("<f2"), ""),
    Datatype("FP32", 11, np.dtype("<f4"), "fp32_contents"),
    Datatype("FP64", 12, np.dtype("<f8"), "fp64_contents"),
    Datatype("BYTES", 13, np.dtype(object), "bytes_contents"),
    Datatype("BF16", 14, np.dtype("<u2"), ""),
)

BY_NAME = {datatype.name: datatype for datatype in TABLE}
BY_NUMBER = {datatype.number: datatype for datatype in TABLE}
"""By the numbers of a model's configuration."""

DTYPES = {datatype.name: datatype.dtype for datatype in TABLE if not datatype.is_bytes}
"""The NumPy type of each datatype of numbers."""

_BY_DTYPE = {datatype.dtype: datatype for datatype in TABLE if datatype.name != "BF16"}


def find(name: str, what: str, error: Callable[[str], Exception]) -> Datatype:
    """Return the datatype called `name`.

    Raises:
        error: there is none; `what` opens the message.
    """
    datatype = BY_NAME.get(name)
    if datatype is None:
        raise error(f"{what}: unknown datatype {name[:40]!r}")
    return datatype


def of_array(array: np.ndarray[Any, np.dtype[Any]]) -> Datatype | None:
    """Return the datatype of an array's elements; None for elements that the protocol does not have."""
    dtype = array.dtype
    if dtype.kind in "OSU":
        return BY_NAME["BYTES"]
    # ml_dtypes need not be installed.
    if dtype.name == "bfloat16":
        return BY_NAME["BF16"]
    return _BY_DTYPE.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
