"""Operation `softmax_topk`: the likeliest classes of a classifier's output, with probabilities and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import numpy as np
from pydantic import Field

from kernels.softmax_topk import softmax_topk
from kernels.top_k import top_k
from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.resident import fetched
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor


class SoftmaxTopkParameters(Parameters):
    """Parameters of `softmax_topk`."""

    k: int = Field(5, ge=1, le=10_000)
    """Number of classes; all of them where the model has fewer."""
    labels: str = ""
    """File with the name of each class on a line; empty: there are no names."""
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    """Function that turns the model's output into scores; none: the output is scores."""


class SoftmaxTopk:
    """FP32 [classes] to the best k: scores, indices, and names when there is a file of labels."""

    is_batched = True
    only_computes = True
    inputs = (spec("logits", "FP32", -1),)

    def __init__(self, parameters: SoftmaxTopkParameters, context: OperationContext) -> None:
        self._parameters, self._device = parameters, context.device
        self._labels: Tensor | None = None
        self.outputs: tuple[TensorSpec, ...] = (spec("scores", "FP32", -1), spec("indices", "INT64", -1))
        if parameters.labels:
            lines = context.assets.lines(parameters.labels)
            self._labels = np.empty(len(lines), object)
            self._labels[:] = [line.encode() for line in lines]
            self.outputs = (*self.outputs, spec("labels", "BYTES", -1))

    def run(self, inputs: Mapping[str, Value]) -> Results:
        logits = cast("Tensor", inputs["logits"])
        count, classes = logits.shape
        unfit: dict[int, str] = {}
        if self._labels is not None and classes != len(self._labels):
            reason = f"input 'logits' has {classes} classes, '{self._parameters.labels}' has {len(self._labels)} names"
            unfit = dict.fromkeys(range(count), f"{reason}: the file is not this model's")
        scores, indices = self._best(logits)
        values: dict[str, Value] = {"scores": scores, "indices": indices}
        if self._labels is not None:
            [on_host] = fetched([indices])
            values["labels"] = np.full(on_host.shape, b"", object) if unfit else self._labels[on_host]
        return Results(values, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"logits": np.zeros((1, 3 if self._labels is None else len(self._labels)), np.float32)}

    def _best(self, logits: Tensor) -> tuple[Value, Value]:
        if self._parameters.activation == "softmax":
            to_value = self._device.to_value
            scores, indices = softmax_topk(self._device.to_device(logits), self._parameters.k)
            return to_value(scores), to_value(indices)
        scores, indices = top_k(fetched([logits])[0], self._parameters.k)
        if self._parameters.activation == "sigmoid":
            # exp of a large number is infinite, and 1 / infinity is 0.
            with np.errstate(over="ignore"):
                scores = 1 / (1 + np.exp(-scores))
        return scores.astype(np.float32), indices
