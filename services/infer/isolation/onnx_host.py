"""An ONNX model inside a model process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from services.infer.calls.signature import TensorSpec
from services.infer.isolation import payload
from services.infer.isolation.hosted import Batch, Facts, Given, Load, LoadFailed, RunFailed, Sender
from services.infer.isolation.payload import Tensor
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.runtime import ModelFailed, SessionOptions
from shoal.errors import FailedPrecondition


class OnnxModel:
    """One model in ONNX Runtime."""

    def __init__(self, load: Load) -> None:
        """Raises LoadFailed."""
        try:
            self._session = OnnxRuntime().load(load.file, SessionOptions(**load.options))
        except FailedPrecondition as err:
            raise LoadFailed(err.message) from err
        self._datatypes = {spec.name: spec.datatype.name for spec in self._session.outputs}
        self.facts = Facts(
            _told(self._session.inputs),
            _told(self._session.outputs),
            _told(getattr(self._session, "optional_inputs", ())),
            text=self._session.text,
        )

    def run(self, batch: Batch) -> Given:
        try:
            inputs = {
                name: _as_text(array) if datatype == "BYTES" else array
                for name, (datatype, array) in batch.inputs.items()
            }
            results = self._session.run(inputs, batch.outputs)
        except ModelFailed as err:
            raise RunFailed(str(err)) from err
        return Given([payload.part(n, self._datatypes[n], [r]) for n, r in zip(batch.outputs, results, strict=True)])

    def start(self, batch: Batch, sender: Sender) -> Iterator[None] | None:
        raise AssertionError("an ONNX model is not decoupled")

    def close(self) -> None:
        self._session.close()


def _told(specs: Sequence[TensorSpec]) -> list[tuple[str, str, Sequence[int]]]:
    return [(spec.name, spec.datatype.name, spec.shape) for spec in specs]


def _as_text(array: Tensor) -> Tensor:
    text = np.empty(array.size, object)
    text[:] = [element.decode() for element in array.reshape(-1)]
    return text.reshape(array.shape)
