"""The datatypes of the protocol, under the names that the wire, the model's configuration and NumPy know them by.

BF16 has no NumPy type: its tensors are carried as the 16 bits of each element (`uint16`). BYTES tensors are object
arrays whose elements are `bytes`, or `str` for a runtime whose strings are text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    Datatype("BOOL", config_pb2.TYPE_BOOL, np.dtype("?"), "bool_contents"),
    Datatype("UINT8", config_pb2.TYPE_UINT8, np.dtype("u1"), "uint_contents"),
    Datatype("UINT16", config_pb2.TYPE_UINT16, np.dtype("<u2"), "uint_contents"),
    Datatype("UINT32", config_pb2.TYPE_UINT32, np.dtype("<u4"), "uint_contents"),
    Datatype("UINT64", config_pb2.TYPE_UINT64, np.dtype("<u8"), "uint64_contents"),
    Datatype("INT8", config_pb2.TYPE_INT8, np.dtype("i1"), "int_contents"),
    Datatype("INT16", config_pb2.TYPE_INT16, np.dtype("<i2"), "int_contents"),
    Datatype("INT32", config_pb2.TYPE_INT32, np.dtype("<i4"), "int_contents"),
    Datatype("INT64", config_pb2.TYPE_INT64, np.dtype("<i8"), "int64_contents"),
    Datatype("FP16", config_pb2.TYPE_FP16, np.dtype("<f2"), ""),
    Datatype("BF16", config_pb2.TYPE_BF16, np.dtype("<u2"), ""),
    Datatype("FP32", config_pb2.TYPE_FP32, np.dtype("<f4"), "fp32_contents"),
    Datatype("FP64", config_pb2.TYPE_FP64, np.dtype("<f8"), "fp64_contents"),
    Datatype("BYTES", config_pb2.TYPE_STRING, np.dtype(object), "bytes_contents"),
)

BY_NAME = {datatype.name: datatype for datatype in _TABLE}
BY_CONFIG = {datatype.config: datatype for datatype in _TABLE}
