"""Kernels, an ONNX Runtime session and the copy of its answers on one stream, with nothing that waits in between.

    slot.send ──> resize_norm ──> session ──> copy out ──> event        all on one CUDA stream
                                                             └── Answer.wait: the only place that waits

ONNX Runtime gets our stream (`user_compute_stream`) and device pointers (IOBinding): its own stream would not wait for
the kernels before it. It lives here and not in kernels/, which knows arrays and no models. On a machine without a GPU
the same calls run on the CPU; the CUDA part has never run on a GPU. It is for programs that know the shapes of their
outputs, and so have one copy for all of them; the server, which does not, has `onnx_lane`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from kernels.memory import Event, Memory
from shoal.errors import FailedPrecondition, InvalidArgument

Array = npt.NDArray[Any]
_ALIGNMENT = 256
"""Bytes: as CUDA's own allocations begin."""


class Outputs:
    """A model's outputs side by side in one buffer, and as much pinned memory on the host: one copy takes all of them.

    Args:
        shapes: shape and dtype of each output, by name.
    """

    def __init__(self, memory: Memory, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        places, nbytes = _places(shapes)
        self.buffer = memory.empty((nbytes,), np.uint8)
        self.pinned: Array = self.buffer if isinstance(self.buffer, np.ndarray) else memory.pinned(nbytes)
        self.arrays = {name: _view(self.buffer, *place) for name, place in places.items()}
        """Where the model runs."""
        self.host: dict[str, Array] = {name: _view(self.pinned, *place) for name, place in places.items()}
        """Where an answer arrives; the same memory where there is no GPU."""


def _places(
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
) -> tuple[dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]], int]:
    places, at = {}, 0
    for name, (shape, dtype) in shapes.items():
        places[name] = (at, tuple(shape), np.dtype(dtype))
        at += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, max(at, 1)


def _view(buffer: Any, at: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


class Answer:
    """Outputs on their way to the host."""

    def __init__(self, outputs: dict[str, Array], event: Event) -> None:
        self._outputs = outputs
        self._event = event

    @property
    def done(self) -> bool:
        return self._event.done

    def wait(self) -> dict[str, Array]:
        """The outputs, views of the `Outputs` they were asked of; blocks until they are there."""
        self._event.synchronize()
        return self._outputs


class StreamedModel:
    """One model with its own stream. Calls come from one thread; `Answer.wait` may come from another.

    Args:
        model: an .onnx file, or its bytes.
        memory: where it runs.
        settings: of the session.

    Raises:
        FailedPrecondition: ONNX Runtime cannot load it, or has no CUDA where `memory` is a GPU.
    """

    def __init__(self, model: Path | bytes, memory: Memory, settings: onnxruntime.SessionOptions | None = None) -> None:
        self.memory = memory
        self.stream = memory.stream()
        source = model if isinstance(model, bytes) else str(model)
        provider = _provider(memory, self.stream)
        if provider[0] not in onnxruntime.get_available_providers():
            raise FailedPrecondition(f"this ONNX Runtime has no {provider[0]}: install onnxruntime-gpu (extra cuda13)")
        try:
            self._session = onnxruntime.InferenceSession(source, settings, providers=[provider])
        except Exception as err:  # It raises a class of its own for each code, RuntimeError, and more.
            raise FailedPrecondition(f"ONNX Runtime cannot load the model: {err}") from err
        if provider[0] not in self._session.get_providers():  # It goes on without, and says so only in its log.
            raise FailedPrecondition(f"ONNX Runtime cannot start {provider[0]}: a library or device is missing")
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = {value.name for value in self._session.get_outputs()}
        self._options = onnxruntime.RunOptions()
        if memory.name == "cuda":
            # Otherwise every run ends with a wait for the stream.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, inputs: Mapping[str, Any], outputs: Outputs) -> None:
        """Puts one execution on the stream; waits for nothing on a GPU.

        Args:
            inputs: contiguous arrays in `memory`, by name. They must live until the stream has passed.
            outputs: some or all of the model's.

        Raises:
            InvalidArgument: an unknown or missing name, or an array that the model does not take.
        """
        _check_names("input", inputs, self._inputs, need_all=True)
        _check_names("output", outputs.arrays, self._outputs, need_all=False)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, *self._where(name, array))
        for name, array in outputs.arrays.items():
            binding.bind_output(name, *self._where(name, array))
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as err:
            raise InvalidArgument(f"the model does not run: {err}") from err

    def answer(self, outputs: Outputs) -> Answer:
        """Puts the one copy of all outputs to the host on the stream, and a mark behind it.

        `outputs` may be run into again when the answer has been waited for and read; two of them keep the stream busy.
        """
        if outputs.pinned is not outputs.buffer:
            self.memory.copy_out(outputs.buffer, outputs.pinned, self.stream)
        event = self.memory.event()
        event.record(self.stream)
        return Answer(outputs.host, event)

    def _where(self, name: str, array: Any) -> tuple[str, int, Any, list[int], int]:
        if not array.flags.c_contiguous:
            raise InvalidArgument(f"{name!r} is not contiguous")
        is_host = isinstance(array, np.ndarray)
        if is_host != (self.memory.name == "cpu"):
            raise InvalidArgument(f"{name!r} is on the {'host' if is_host else 'GPU'}, the model on {self.memory.name}")
        pointer = array.ctypes.data if is_host else array.data.ptr
        return self.memory.name, self.memory.device_id, array.dtype.type, list(array.shape), pointer


def _provider(memory: Memory, stream: Any) -> tuple[str, dict[str, str]]:
    if memory.name == "cpu":
        return "CPUExecutionProvider", {}
    return "CUDAExecutionProvider", {"device_id": str(memory.device_id), "user_compute_stream": str(stream.ptr)}


def _check_names(kind: str, given: Mapping[str, Any], known: set[str], need_all: bool) -> None:
    if unknown := set(given) - known:
        raise InvalidArgument(f"the model has no {kind} {sorted(unknown)}; it has {sorted(known)}")
    if need_all and (missing := known - set(given)):
        raise InvalidArgument(f"{kind} {sorted(missing)} is missing")
