"""An ONNX file, asked through ONNX Runtime on the CPU as infer would ask it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from shoal.convert.original import Array, Port, Tensors
from shoal.errors import FailedPrecondition, InvalidArgument

_NOTHING = 4  # Severity FATAL: what goes wrong is raised.
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
    """A loaded file. `inputs` and `outputs` are as it declares them."""

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        """`threads` 0: as many as there are cores. Raises FailedPrecondition when ONNX Runtime cannot load it."""
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = _NOTHING
        settings.intra_op_num_threads = threads
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        except Exception as err:  # It raises a class of its own for each code.
            raise FailedPrecondition(f"ONNX Runtime cannot load {file.name}: {_plain(err)}") from err
        self.inputs: Sequence[Port] = [_port(arg) for arg in self._session.get_inputs()]
        self.outputs: Sequence[Port] = [_port(arg) for arg in self._session.get_outputs()]

    @property
    def is_batched(self) -> bool:
        """The first dimension of every input and output is of any size."""
        return all(port.shape[:1] == (None,) for port in (*self.inputs, *self.outputs))

    def answer(self, inputs: Mapping[str, Array]) -> Tensors:
        """All outputs by name. Inputs are cast to what the model takes.

        Raises:
            InvalidArgument: an input is missing, or ONNX Runtime does not take them.
        """
        missing = [port.name for port in self.inputs if port.name not in inputs]
        if missing:
            raise InvalidArgument(f"no data for the input {', '.join(missing)}")
        feed = {port.name: cast(inputs[port.name], port) for port in self.inputs}
        names = [port.name for port in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        except Exception as err:
            raise InvalidArgument(f"ONNX Runtime: {_plain(err)}") from err


def cast(values: Array, port: Port) -> Array:
    """`values` in the type of `port`."""
    if port.dtype.kind == "O":
        return np.array([_text(value) for value in values.reshape(-1)], dtype=object).reshape(values.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, dtype=port.dtype)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _port(arg: Any) -> Port:
    kind = arg.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _DTYPES:
        raise FailedPrecondition(f"{arg.name!r} is a {arg.type}: only tensors of {', '.join(_DTYPES)} are handled here")
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else None for dim in arg.shape)
    return Port(arg.name, np.dtype(_DTYPES[kind]), shape)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
