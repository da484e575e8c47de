"""The datatypes of the protocol, under the names that the wire, the model's configuration and NumPy know them by.

BF16 has no NumPy type: its tensors are carried as the 16 bits of each element (`uint16`). BYTES tensors are object
arrays whose elements are `bytes`, or `str` for a runtime whose strings are text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.infer.calls.dtypes import NUMBERS
from shoal.inference.v2 import model_config_pb2 as config_pb2


@dataclass(frozen=True)
class Datatype:
    """One datatype."""

    name: str
    """On the wire: `FP32`."""
    config: config_pb2.DataType
    """In a model's configuration: the number of TYPE_FP32."""
    dtype: np.dtype[np.generic]
    """In memory, little-endian as on the wire."""
    contents: str
    """The field of InferTensorContents that carries it; empty where only raw bytes can."""

    @property
    def is_bytes(self) -> bool:
        return self.name == "BYTES"


_TABLE = (
    Datatype("BOOL", config_pb2.TYPE_BOOL, NUMBERS["BOOL"], "bool_contents"),
    Datatype("UINT8", config_pb2.TYPE_UINT8, NUMBERS["UINT8"], "uint_contents"),
    Datatype("UINT16", config_pb2.TYPE_UINT16, NUMBERS["UINT16"], "uint_contents"),
    Datatype("UINT32", config_pb2.TYPE_UINT32, NUMBERS["UINT32"], "uint_contents"),
    Datatype("UINT64", config_pb2.TYPE_UINT64, NUMBERS["UINT64"], "uint64_contents"),
    Datatype("INT8", config_pb2.TYPE_INT8, NUMBERS["INT8"], "int_contents"),
    Datatype("INT16", config_pb2.TYPE_INT16, NUMBERS["INT16"], "int_contents"),
    Datatype("INT32", config_pb2.TYPE_INT32, NUMBERS["INT32"], "int_contents"),
    Datatype("INT64", config_pb2.TYPE_INT64, NUMBERS["INT64"], "int64_contents"),
    Datatype("FP16", config_pb2.TYPE_FP16, NUMBERS["FP16"], ""),
    Datatype("BF16", config_pb2.TYPE_BF16, NUMBERS["BF16"], ""),
    Datatype("FP32", config_pb2.TYPE_FP32, NUMBERS["FP32"], "fp32_contents"),
    Datatype("FP64", config_pb2.TYPE_FP64, NUMBERS["FP64"], "fp64_contents"),
    Datatype("BYTES", config_pb2.TYPE_STRING, np.dtype(object), "bytes_contents"),
)

BY_NAME = {datatype.name: datatype for datatype in _TABLE}
BY_CONFIG = {datatype.config: datatype for datatype in _TABLE}
