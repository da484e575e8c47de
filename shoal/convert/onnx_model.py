"""ONNX model, run with ONNX Runtime on the CPU as infer runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from shoal.convert.original import Array, Port, Tensors
from shoal.errors import FailedPrecondition, InvalidArgument

# Severity FATAL: errors are raised, so logging them is not needed.
_LOG_FATAL = 4
_DTYPES = {
    "bool": "?",
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "int64": "i8",
    "float16": "f2",
    "float": "f4",
    "double": "f8",
    "string": "O",
}


class OnnxModel:
    """A loaded ONNX file, with `inputs` and `outputs` as declared in the file."""

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        """Load the file. `threads` 0: one for each core. Raises FailedPrecondition when ONNX Runtime cannot load it."""
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = _LOG_FATAL
        settings.intra_op_num_threads = threads
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        except Exception as err:
            # ONNX Runtime has a separate class for each error code.
            raise FailedPrecondition(f"ONNX Runtime cannot load {file.name}: {_one_line(err)}") from err
        self.inputs: Sequence[Port] = [_port(arg) for arg in self._session.get_inputs()]
        self.outputs: Sequence[Port] = [_port(arg) for arg in self._session.get_outputs()]

    @property
    def is_batched(self) -> bool:
        """True when the first dimension of every input and output has a variable size."""
        return all(port.shape[:1] == (None,) for port in (*self.inputs, *self.outputs))

    def predict(self, inputs: Mapping[str, Array]) -> Tensors:
        """Return all outputs by name. Inputs are cast to the model's types.

        Raises:
            InvalidArgument: an input is missing, or ONNX Runtime rejects the inputs.
        """
        missing = [port.name for port in self.inputs if port.name not in inputs]
        if missing:
            raise InvalidArgument(f"no data for the input {', '.join(missing)}")
        feed = {port.name: cast(inputs[port.name], port) for port in self.inputs}
        names = [port.name for port in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        except Exception as err:
            raise InvalidArgument(f"ONNX Runtime: {_one_line(err)}") from err


def cast(values: Array, port: Port) -> Array:
    """Return `values` in the type of `port`."""
    if port.dtype.kind == "O":
        return np.array([_text(value) for value in values.reshape(-1)], dtype=object).reshape(values.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, dtype=port.dtype)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _port(arg: Any) -> Port:
    kind = arg.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _DTYPES:
        raise FailedPrecondition(f"{arg.name!r} is a {arg.type}: only tensors of {', '.join(_DTYPES)} are supported")
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else None for dim in arg.shape)
    return Port(arg.name, np.dtype(_DTYPES[kind]), shape)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
