"""Session of one model in ONNX Runtime.

numbers   NumPy arrays, passed without a copy
BYTES     ONNX strings are UTF-8 text: `str` in memory
BF16      NumPy has no such type: 16-bit patterns, converted from and to OrtValue
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mesh.process.freed_memory import return_freed_memory
from services.infer.error_text import quoted
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from services.infer.runtimes import onnx_arena
from services.infer.runtimes.given_up import GivenUp
from services.infer.runtimes.runtime import ModelFailed, Session
from shoal.errors import FailedPrecondition
from shoal.oip.datatypes import BY_NAME, Datatype

_DATATYPES = {
    "tensor(bool)": BY_NAME["BOOL"],
    "tensor(uint8)": BY_NAME["UINT8"],
    "tensor(uint16)": BY_NAME["UINT16"],
    "tensor(uint32)": BY_NAME["UINT32"],
    "tensor(uint64)": BY_NAME["UINT64"],
    "tensor(int8)": BY_NAME["INT8"],
    "tensor(int16)": BY_NAME["INT16"],
    "tensor(int32)": BY_NAME["INT32"],
    "tensor(int64)": BY_NAME["INT64"],
    "tensor(float16)": BY_NAME["FP16"],
    "tensor(bfloat16)": BY_NAME["BF16"],
    "tensor(float)": BY_NAME["FP32"],
    "tensor(double)": BY_NAME["FP64"],
    "tensor(string)": BY_NAME["BYTES"],
}

# TensorProto.BFLOAT16 of onnx.proto.
_ONNX_BFLOAT16 = 16


class OnnxSession(Session):
    """One model in ONNX Runtime."""

    text = True

    def __init__(
        self,
        session: Any,
        run_entries: Mapping[str, str] | None = None,
        gpu: int | None = None,
        *,
        may_not_end: bool = False,
    ) -> None:
        """Read the signature of `session`.

        Args:
            run_entries: ONNX Runtime's settings for each run.
            gpu: number of the session's GPU; None: the CPU.
            may_not_end: the model has an operator whose time depends on values.

        Raises:
            FailedPrecondition: an input or output is not a tensor of a known datatype.
        """
        self.gpus = () if gpu is None else (gpu,)
        # A thread that runs the model on a GPU waits for the GPU.
        self.only_computes = gpu is None and not may_not_end
        self.may_not_end = may_not_end
        self._entries = dict(run_entries or {})
        self._run_options = _run_options(self._entries)
        # Initializers among the file's inputs have themselves as default: a configuration may declare them as inputs.
        self.optional_inputs = tuple(
            replace(_spec(arg, "input"), is_optional=True) for arg in session.get_overridable_initializers()
        )
        self.inputs = tuple(_spec(arg, "input") for arg in session.get_inputs())
        self.outputs = tuple(_spec(arg, "output") for arg in session.get_outputs())
        self._session = session
        # Bypasses ONNX Runtime's Python class, whose checks cost a quarter of a small model's run: requests are checked
        # already.
        self._run = getattr(session, "_sess", session).run
        self.specs = (*self.outputs, *self.inputs, *self.optional_inputs)
        self._needs_ort_values = any(spec.datatype.name == "BF16" for spec in self.specs)
        self._datatypes = {spec.name: spec.datatype for spec in self.specs}

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        return self._run_with(inputs, outputs, self._run_options)

    def run_until(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], given_up: GivenUp) -> list[Tensor]:
        options = _run_options(self._entries)
        # Every node looks at this, those of loops too.
        with given_up.calling(partial(setattr, options, "terminate", True)):
            return self._run_with(inputs, outputs, options)

    def _run_with(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], options: Any) -> list[Tensor]:
        try:
            results = self._run_once(inputs, outputs, options)
        # ONNX Runtime's exceptions have no common class.
        except Exception as err:
            if not onnx_arena.is_full(err):
                raise ModelFailed(plain(err)) from err
            results = self._run_in_shrunk_arena(inputs, outputs, options)
        if self._needs_ort_values:
            return results
        for n, result in enumerate(results):
            for array in inputs.values():
                # An output that shares an input's memory would change when the batch's buffer is reused.
                if np.may_share_memory(result, array):
                    results[n] = result.copy()
        return results

    def _run_once(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], options: Any) -> list[Tensor]:
        if self._needs_ort_values:
            return self._run_ort_values(inputs, outputs, options)
        feed = inputs if isinstance(inputs, dict) else dict(inputs)
        results: list[Tensor] = self._run(outputs if isinstance(outputs, list) else list(outputs), feed, options)
        return results

    def _run_in_shrunk_arena(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], options: Any) -> list[Tensor]:
        # Regions that earlier runs have left may be too small, each by itself.
        self.shrink()
        try:
            return self._run_once(inputs, outputs, options)
        except Exception as err:
            # What the run has got would be missing elsewhere.
            self.shrink()
            raise ModelFailed(plain(err)) from err

    def _run_ort_values(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], options: Any) -> list[Tensor]:
        feed = {name: _ort_value(array, self._datatypes[name]) for name, array in inputs.items()}
        return [_array(value) for value in self._session.run_with_ort_values(list(outputs), feed, options)]

    def shrink(self) -> None:
        """Free the parts of the CPU's arena that no run uses. A run that is terminated at once does it, and no node."""
        run = self._run
        if run is None or self.gpus or self._needs_ort_values:
            return
        # The expected error, or that of a session without an arena.
        with suppress(Exception):
            run([self.outputs[0].name], {spec.name: _least(spec) for spec in self.inputs}, _shrinking())

    def interrupt(self) -> None:
        self._run_options.terminate = True

    def close(self) -> None:
        self._session = self._run = None
        return_freed_memory()


@cache
def _shrinking() -> Any:
    options = _run_options({"memory.enable_memory_arena_shrinkage": "cpu:0"})
    options.terminate = True
    return options


def _least(spec: TensorSpec) -> Tensor:
    """Return an input with one element in each dimension that varies."""
    shape = [max(dim, 1) for dim in spec.shape]
    return np.full(shape, "", object) if spec.datatype.is_bytes else np.zeros(shape, spec.datatype.dtype)


def _run_options(entries: Mapping[str, str]) -> Any:
    options = onnxruntime.RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options


def _spec(arg: Any, role: str) -> TensorSpec:
    datatype = _DATATYPES.get(arg.type)
    if datatype is None:
        raise FailedPrecondition(
            f"{role} '{arg.name}' is a {arg.type}: only tensors of {', '.join(BY_NAME)} are served"
        )
    return TensorSpec(arg.name, datatype, tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in arg.shape))


def _ort_value(array: Tensor, datatype: Datatype) -> Any:
    if datatype.name == "BF16":
        contiguous = np.ascontiguousarray(array)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, _ONNX_BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Tensor:
    if value.element_type() != _ONNX_BFLOAT16:
        array: Tensor = np.array(value.numpy())
        return array
    size = 2 * int(np.prod(value.shape()))
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, "<u2").reshape(value.shape())


_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_NODE = re.compile(r"^Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ")
# Only from the begin of a word: a search from each slash of a name of 1 MB took half an hour.
_SOURCE = re.compile(r"(?<![^\s:(])/\S+\.(?:h|cc|cpp|hpp|cu|cuh):\d+ (?:[^()]*\([^()]*\) (?:const )?)?(?:\[[^\]]*\] )?")


# Names in a model are as long as its author likes; of a message, 1,000 characters are shown.
_MOST_CHARACTERS, _SHOWN_CHARACTERS = 4_000, 1_000


def plain(error: Exception, file: Path | None = None) -> str:
    """Return ONNX Runtime's message without error codes, its source files and the server's folders."""
    # Runs with IOBinding add the prefix "Error in execution: ".
    message = _STATUS.sub("", str(error)).removeprefix("Error in execution: ")
    if file is not None:
        message = message.replace(str(file), file.name).replace(str(file.parent), ".")
    node = _NODE.match(message)
    message = _SOURCE.sub("", _NODE.sub("", message)[:_MOST_CHARACTERS])
    where = f" (node {quoted(node[2] or node[1])})" if node else ""
    return " ".join(message.split())[:_SHOWN_CHARACTERS] + where
