"""The datatypes of the protocol, under the names that the wire, the model's configuration and NumPy know them by.

BF16 has no NumPy type: its tensors are carried as the 16 bits of each element (`uint16`). BYTES tensors are object
arrays whose elements are `bytes`, or `str` for a runtime whose strings are text. Model processes import this module and
no protobuf: the numbers of datatypes in configurations are written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.infer.calls.dtypes import NUMBERS


@dataclass(frozen=True)
class Datatype:
    """One datatype."""

    name: str
    """On the wire: `FP32`."""
    config: int
    """In a model's configuration: the number of TYPE_FP32."""
    dtype: np.dtype[np.generic]
    """In memory, little-endian as on the wire."""
    contents: str
    """The field of InferTensorContents that carries it; empty where only raw bytes can."""

    @property
    def is_bytes(self) -> bool:
        return self.name == "BYTES"

    @property
    def config_name(self) -> str:
        """In a model's configuration: `TYPE_FP32`."""
        return "TYPE_STRING" if self.is_bytes else f"TYPE_{self.name}"


_TABLE = (
    Datatype("BOOL", 1, NUMBERS["BOOL"], "bool_contents"),
    Datatype("UINT8", 2, NUMBERS["UINT8"], "uint_contents"),
    Datatype("UINT16", 3, NUMBERS["UINT16"], "uint_contents"),
    Datatype("UINT32", 4, NUMBERS["UINT32"], "uint_contents"),
    Datatype("UINT64", 5, NUMBERS["UINT64"], "uint64_contents"),
    Datatype("INT8", 6, NUMBERS["INT8"], "int_contents"),
    Datatype("INT16", 7, NUMBERS["INT16"], "int_contents"),
    Datatype("INT32", 8, NUMBERS["INT32"], "int_contents"),
    Datatype("INT64", 9, NUMBERS["INT64"], "int64_contents"),
    Datatype("FP16", 10, NUMBERS["FP16"], ""),
    Datatype("BF16", 14, NUMBERS["BF16"], ""),
    Datatype("FP32", 11, NUMBERS["FP32"], "fp32_contents"),
    Datatype("FP64", 12, NUMBERS["FP64"], "fp64_contents"),
    Datatype("BYTES", 13, np.dtype(object), "bytes_contents"),
)

BY_NAME = {datatype.name: datatype for datatype in _TABLE}
BY_CONFIG = {datatype.config: datatype for datatype in _TABLE}
