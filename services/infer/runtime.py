"""What runs a model: a runtime loads files into sessions, a session maps arrays to arrays.

Both are blocking, and called on worker threads only. ONNX Runtime is the one implementation (`onnx_runtime`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from services.infer.signature import TensorSpec
from services.infer.tensors import Tensor


class ModelFailed(Exception):
    """The model raised. The message is the model's own, without the insides of the runtime: callers see it."""


@dataclass(frozen=True)
class SessionOptions:
    """How to run a model."""

    intra_op_threads: int
    inter_op_threads: int = 1
    graph_level: int = 0
    """-1: no graph optimisation; 0 and above: all of it."""
    entries: Mapping[str, str] = field(default_factory=dict)
    """The runtime's own settings, by its own names."""


class Session(Protocol):
    """One loaded model. Safe to run on several threads at the same time."""

    inputs: tuple[TensorSpec, ...]
    """As the file says; a shape of () may also mean that the file says nothing of it."""
    outputs: tuple[TensorSpec, ...]
    text: bool
    """BYTES elements must be `str`, and come as `str`; else they are `bytes`."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        """The outputs of these names. They do not share memory with the inputs.

        Raises:
            ModelFailed: the model cannot process these inputs.
        """

    def close(self) -> None:
        """Gives its memory back. It is not run after that."""


class Runtime(Protocol):
    """Loads models of one kind of file."""

    platform: str
    """The name in a model's configuration: `onnxruntime_onnx`."""
    backend: str
    """The other name there: `onnxruntime`."""

    def load(self, file: Path, options: SessionOptions) -> Session:
        """Loads a model.

        Raises:
            FailedPrecondition: the file is no model, or one that this runtime cannot run; the message says why.
        """
