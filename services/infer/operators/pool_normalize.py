"""Operation `pool_normalize`: token embeddings to one embedding of the text, as in sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np

from kernels.pool_normalize import l2_normalize, pool_normalize
from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.tensors import Tensor

# A tensor without tokens has no bytes, whatever the size of its embeddings.
_MAX_SIZE_OF_NONE = 1 << 16


class PoolNormalizeParameters(Parameters):
    """Parameters of `pool_normalize`."""

    pooling: Literal["mean", "cls"] = "mean"
    """mean: the mean of the tokens in the mask; cls: the first token."""
    normalize: bool = True
    """Scale the embedding to length 1."""


class PoolNormalize:
    """FP32 [tokens, size] and INT64 [tokens] to FP32 [size]."""

    is_batched = True
    only_computes = True
    inputs = (spec("token_embeddings", "FP32", -1, -1), spec("attention_mask", "INT64", -1))
    outputs = (spec("embedding", "FP32", -1),)

    def __init__(self, parameters: PoolNormalizeParameters, context: OperationContext) -> None:
        self._parameters, self._device = parameters, context.device

    def run(self, inputs: Mapping[str, Value]) -> Results:
        tokens, mask = cast("Tensor", inputs["token_embeddings"]), cast("Tensor", inputs["attention_mask"])
        if tokens.shape[:2] != mask.shape:
            count = tokens.shape[1]
            return self._unfit(tokens, f"input 'attention_mask' is for {mask.shape[1]} tokens, there are {count}")
        if self._parameters.pooling == "cls" and not tokens.shape[1]:
            return self._unfit(tokens, "input 'token_embeddings' has no tokens: expected at least one")
        if not tokens.shape[1] and tokens.shape[2] > _MAX_SIZE_OF_NONE:
            return self._unfit(
                tokens,
                f"input 'token_embeddings' has no tokens of {tokens.shape[2]} numbers: expected at most "
                f"{_MAX_SIZE_OF_NONE} numbers, or a token",
            )
        return Results({"embedding": self._device.to_value(self._pooled(tokens, mask))})

    def example(self) -> Mapping[str, Value]:
        return {"token_embeddings": np.ones((1, 2, 4), np.float32), "attention_mask": np.ones((1, 2), np.int64)}

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Any:
        to_device, normalize = self._device.to_device, self._parameters.normalize
        if self._parameters.pooling == "mean":
            return pool_normalize(to_device(tokens), to_device(mask), normalize=normalize)
        first = to_device(tokens)[:, 0].copy()
        return l2_normalize(first) if normalize else first

    def _unfit(self, tokens: Tensor, reason: str) -> Results:
        placeholder = np.zeros((len(tokens), 0), np.float32)
        return Results({"embedding": placeholder}, dict.fromkeys(range(len(tokens)), reason))
