"""An ONNX model inside a model process. Nothing here may import protobuf or gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from services.infer.model_process import payload
from services.infer.model_process.hosted import Batch, BatchResult, HostedModelInfo, Load, LoadFailed, RunFailed, Sender
from services.infer.model_process.payload import Tensor
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.reshape import ReshapedSession, reshapes_of
from services.infer.runtimes.runtime import ExecutionPlacement, ModelFailed, Provider, Session, SessionOptions
from shoal.errors import FailedPrecondition


class OnnxModel:
    """`hosted.Hosted` for one ONNX model."""

    def __init__(self, load: Load) -> None:
        """Load the model. Raises LoadFailed."""
        try:
            self._session: Session = OnnxRuntime().load(load.file, _options(load.options))
            if reshapes := reshapes_of(load.config):
                self._session = ReshapedSession(self._session, reshapes)
        except FailedPrecondition as err:
            raise LoadFailed(err.message) from err
        self._datatypes = {spec.name: spec.datatype.name for spec in self._session.outputs}
        self.model_info = HostedModelInfo(
            _specs_header(self._session.inputs),
            _specs_header(self._session.outputs),
            _specs_header(self._session.optional_inputs),
            text=self._session.text,
            handles_missing_inputs=self._session.handles_missing_inputs,
            gpus=self._session.gpus,
        )

    def run(self, batch: Batch) -> BatchResult:
        try:
            inputs = {
                name: _as_text(array) if datatype == "BYTES" else array
                for name, (datatype, array) in batch.inputs.items()
            }
            results = self._session.run(inputs, batch.outputs)
        except ModelFailed as err:
            raise RunFailed(str(err)) from err
        return BatchResult(
            [payload.part(n, self._datatypes[n], [r]) for n, r in zip(batch.outputs, results, strict=True)]
        )

    def start(self, batch: Batch, sender: Sender) -> Iterator[None] | None:
        raise AssertionError("an ONNX model is not decoupled")

    def close(self) -> None:
        self._session.close()


def _options(fields: Mapping[str, Any]) -> SessionOptions:
    """Return the options whose fields are JSON values here (see `IsolatedOnnxRuntime`)."""
    lists = {"placements": ExecutionPlacement, "gpu_providers": Provider, "cpu_providers": Provider}
    tuples = {key: tuple(kind(*each) for each in fields[key]) for key, kind in lists.items() if key in fields}
    return SessionOptions(**{**fields, **tuples})


def _specs_header(specs: Sequence[TensorSpec]) -> list[tuple[str, str, Sequence[int]]]:
    return [(spec.name, spec.datatype.name, spec.shape) for spec in specs]


def _as_text(array: Tensor) -> Tensor:
    text = np.empty(array.size, object)
    text[:] = [element.decode() for element in array.reshape(-1)]
    return text.reshape(array.shape)
