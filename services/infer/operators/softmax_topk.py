"""The likeliest classes of a classifier's output, with probabilities and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import numpy as np
from pydantic import Field

from kernels.softmax_topk import softmax_topk
from kernels.top_k import top_k
from services.infer.operators.operation import Results, Setting, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.resident import fetched
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor


class SoftmaxTopkParameters(Parameters):
    """Of `softmax_topk`."""

    k: int = Field(5, ge=1, le=10_000)
    """More than there are classes: all of them."""
    labels: str = ""
    """A file with the name of each class on a line; empty: there are no names."""
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    """What makes scores of the model's numbers; none: they are scores already."""


class SoftmaxTopk:
    """FP32 [classes] to the best k: scores, indices, and names where there are some."""

    is_batched = True
    only_computes = True
    inputs = (spec("logits", "FP32", -1),)

    def __init__(self, parameters: SoftmaxTopkParameters, setting: Setting) -> None:
        self._asked, self._place = parameters, setting.place
        self._labels: Tensor | None = None
        self.outputs: tuple[TensorSpec, ...] = (spec("scores", "FP32", -1), spec("indices", "INT64", -1))
        if parameters.labels:
            lines = setting.assets.lines(parameters.labels)
            self._labels = np.empty(len(lines), object)
            self._labels[:] = [line.encode() for line in lines]
            self.outputs = (*self.outputs, spec("labels", "BYTES", -1))

    def run(self, inputs: Mapping[str, Value]) -> Results:
        logits = cast("Tensor", inputs["logits"])
        count, classes = logits.shape
        unfit: dict[int, str] = {}
        if self._labels is not None and classes != len(self._labels):
            why = f"input 'logits' has {classes} classes, '{self._asked.labels}' has {len(self._labels)} names"
            unfit = dict.fromkeys(range(count), f"{why}: the file is not this model's")
        scores, indices = self._best(logits)
        values: dict[str, Value] = {"scores": scores, "indices": indices}
        if self._labels is not None:
            [known] = fetched([indices])
            values["labels"] = np.full(known.shape, b"", object) if unfit else self._labels[known]
        return Results(values, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"logits": np.zeros((1, 3 if self._labels is None else len(self._labels)), np.float32)}

    def _best(self, logits: Tensor) -> tuple[Value, Value]:
        if self._asked.activation == "softmax":
            give = self._place.give
            scores, indices = softmax_topk(self._place.put(logits), self._asked.k)
            return give(scores), give(indices)
        scores, indices = top_k(fetched([logits])[0], self._asked.k)
        if self._asked.activation == "sigmoid":
            with np.errstate(over="ignore"):  # exp of a large number is infinite, and 1 over that is 0.
                scores = 1 / (1 + np.exp(-scores))
        return scores.astype(np.float32), indices
