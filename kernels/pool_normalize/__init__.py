"""Pooling of token embeddings: the mean of a text's unmasked tokens, scaled to length 1, as in sentence-transformers.

pooled[i] = sum of tokens[i, t] where mask[i, t] / number of unmasked tokens
out[i]    = pooled[i] / max(|pooled[i]|, eps)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="cuda")
EPS = 1e-12
MASKS = (arrays.INT64, arrays.INT32, arrays.BOOL)


def pool_normalize(
    tokens: Any, mask: Any, *, normalize: bool = True, eps: float = EPS, out: Any = None, stream: Any = None
) -> Any:
    """Return the masked mean over tokens, with L2 normalisation.

    A text without unmasked tokens gives zeros. Masked tokens are not read, so NaN in padding has no effect; a product
    with the mask would spread it. NaN in an unmasked token makes its column NaN, and with `normalize` the whole row.
    A vector longer than about 1.8e19, whose sum of squares overflows float32, becomes zeros, as in PyTorch.

    Args:
        tokens: [n, t, d] float32 or float16, C-contiguous. On the CPU float16 is copied to float32 first.
        mask: [n, t] int64, int32 or bool; 0 masks a token.
        normalize: False skips the normalisation.
        eps: smallest length to divide by.
        out: [n, d] float32; allocated when None.
        stream: the `cupy.cuda.Stream` to run on; None is CuPy's current one. The call does not wait for it.

    Returns:
        `out`.

    Raises:
        ValueError: a wrong shape or memory order, an `eps` that is not above 0.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    version = OPERATION.version(stream, tokens=tokens, mask=mask, out=out)
    arrays.expect("pool_normalize", "tokens", tokens, ("n", "t", "d"), arrays.FLOAT32, arrays.FLOAT16)
    n, t, d = tokens.shape
    arrays.expect("pool_normalize", "mask", mask, (n, t), *MASKS)
    least = _least("pool_normalize", eps)
    if out is None:
        out = arrays.empty(tokens, (n, d), arrays.FLOAT32, stream)
    arrays.expect_output("pool_normalize", "out", out, (n, d), arrays.FLOAT32)
    if out.size:
        version.pool(tokens, mask, least, normalize, out, stream)
    return out


def l2_normalize(x: Any, *, eps: float = EPS, out: Any = None, stream: Any = None) -> Any:
    """Divide each row by max(its length, eps). A row of zeros stays zeros.

    Args:
        x: [n, d] float32 or float16, C-contiguous.
        eps: smallest length to divide by.
        out: [n, d] float32, which may be `x` itself; allocated when None.
        stream: as in `pool_normalize`.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: as `pool_normalize`.
    """
    version = OPERATION.version(stream, x=x, out=out)
    arrays.expect("l2_normalize", "x", x, ("n", "d"), arrays.FLOAT32, arrays.FLOAT16)
    least = _least("l2_normalize", eps)
    if out is None:
        out = arrays.empty(x, x.shape, arrays.FLOAT32, stream)
    arrays.expect_output("l2_normalize", "out", out, x.shape, arrays.FLOAT32)
    if out.size:
        version.l2(x, least, out, stream)
    return out


def _least(operation: str, eps: float) -> np.float32:
    least = np.float32(eps)
    if not 0 < least < np.inf:
        raise ValueError(f"{operation}: eps must be a float32 above 0, not {eps}")
    return least


def warm_up() -> None:
    """Compile every variant of the chosen backend."""
    for dtype in (np.float32, np.float16):
        l2_normalize(arrays.at_choice(np.zeros((1, 1), dtype)))
        for mask in MASKS:
            pool_normalize(arrays.at_choice(np.zeros((1, 1, 1), dtype)), arrays.at_choice(np.zeros((1, 1), mask)))
