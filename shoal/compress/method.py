"""Names of the compression methods, without their imports. methods.py implements them."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    """Compression method."""

    DYNAMIC = "dynamic"
    """int8 weights of MatMul, Gemm, LSTM, GRU, Attention and Gather; activations are quantized in each call."""
    STATIC = "static"
    """int8 weights and activations, with ranges from calibration rows; convolutions too."""
    FLOAT16 = "float16"
    """float16 weights and arithmetic; inputs and outputs stay float32."""
    PRUNE = "prune"
    """Removal of unused nodes and initializers; the outputs are bit-identical."""
