"""Names of the ways to make a model smaller. methods.py does them, and imports what that takes."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """What is done to a model."""

    DYNAMIC = "dynamic"
    """Weights of MatMul, Gemm, LSTM, GRU, Attention and Gather as int8; activations become int8 call by call."""
    STATIC = "static"
    """Weights and activations as int8, by ranges that were seen on given rows; convolutions too."""
    FLOAT16 = "float16"
    """Weights and arithmetic as float16; inputs and outputs stay float32."""
    PRUNE = "prune"
    """Only what nobody reads is left out: the answers stay the same bits."""
