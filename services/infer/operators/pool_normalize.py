"""Embeddings of tokens to one embedding of the text, as sentence-transformers makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np

from kernels.pool_normalize import l2_normalize, pool_normalize
from services.infer.operators.operation import Results, Setting, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value
from services.infer.requests.tensors import Tensor


class PoolNormalizeParameters(Parameters):
    """Of `pool_normalize`."""

    pooling: Literal["mean", "cls"] = "mean"
    """The mean of the tokens that the mask counts, or the first token."""
    normalize: bool = True
    """To length 1."""


class PoolNormalize:
    """FP32 [tokens, size] and INT64 [tokens] to FP32 [size]."""

    is_batched = True
    only_computes = True
    inputs = (spec("token_embeddings", "FP32", -1, -1), spec("attention_mask", "INT64", -1))
    outputs = (spec("embedding", "FP32", -1),)

    def __init__(self, parameters: PoolNormalizeParameters, setting: Setting) -> None:
        self._asked, self._place = parameters, setting.place

    def run(self, inputs: Mapping[str, Value]) -> Results:
        tokens, mask = cast("Tensor", inputs["token_embeddings"]), cast("Tensor", inputs["attention_mask"])
        if tokens.shape[:2] != mask.shape:
            count = tokens.shape[1]
            return self._unfit(tokens, f"input 'attention_mask' is for {mask.shape[1]} tokens, there are {count}")
        if self._asked.pooling == "cls" and not tokens.shape[1]:
            return self._unfit(tokens, "input 'token_embeddings' has no token, and so no first one")
        return Results({"embedding": self._place.give(self._pooled(tokens, mask))})

    def example(self) -> Mapping[str, Value]:
        return {"token_embeddings": np.ones((1, 2, 4), np.float32), "attention_mask": np.ones((1, 2), np.int64)}

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Any:
        put, normalize = self._place.put, self._asked.normalize
        if self._asked.pooling == "mean":
            return pool_normalize(put(tokens), put(mask), normalize=normalize)
        first = put(tokens)[:, 0].copy()
        return l2_normalize(first) if normalize else first

    def _unfit(self, tokens: Tensor, why: str) -> Results:
        nothing = np.zeros((len(tokens), tokens.shape[2]), np.float32)
        return Results({"embedding": nothing}, dict.fromkeys(range(len(tokens)), why))
