"""Padding of ragged token sequences to one batch with an attention mask.

    flat      a a a b c c            ids   a a a     mask   1 1 1
    offsets   0     3 4   6                b 0 0            1 0 0
                                           c c 0            1 1 0

Sequence i is flat[offsets[i]:offsets[i + 1]].
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from kernels import arrays
from kernels.backend import Operation

OPERATION = Operation(__name__, gpu="numba_cuda")
_BEYOND = {arrays.INT32: 2**31, arrays.INT64: 2**63}


def pad_tokens(
    flat: Any,
    offsets: Any,
    *,
    width: int | None = None,
    pad_id: int = 0,
    side: Literal["right", "left"] = "right",
    truncate: bool = False,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Return padded token ids [n, width] and their mask: 1 for a token, 0 for padding.

    Args:
        flat: [t] int32 or int64, the concatenated sequences.
        offsets: [n + 1] int64, 0 <= offsets[0] <= offsets[1] <= ... <= t. Tokens before the first and behind the last
            offset are not read.
        width: number of columns of the batch. None: the columns of `out`, else the length of the longest sequence,
            which only the host knows without waiting.
        pad_id: fills the rest of a row.
        side: side of the padding. Decoders that continue from the last token need "left".
        truncate: cut longer sequences after `width` tokens; otherwise they are an error.
        out: ids and mask, both [n, width], each int32 or int64; ids must not be narrower than `flat`. When None, both
            are allocated as int64, the usual type of exported models.
        stream: the `cupy.cuda.Stream` to run on; None is CuPy's current one. The call does not wait for it.

    Returns:
        ids and mask: `out`.

    Raises:
        ValueError: offsets out of order or outside `flat`, a sequence longer than `width`, a `pad_id` that the ids'
            dtype cannot hold, a wrong shape. On a GPU the offsets cannot be checked without waiting. There, sequences
            are cut to `flat` and to `width`, so that nothing outside the arrays is read or written.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    ids, mask = out or (None, None)
    version = OPERATION.version(stream, flat=flat, offsets=offsets, ids=ids, mask=mask)
    arrays.expect("pad_tokens", "flat", flat, ("tokens",), arrays.INT32, arrays.INT64)
    arrays.expect("pad_tokens", "offsets", offsets, ("n + 1",), arrays.INT64)
    if not offsets.size:
        raise ValueError("pad_tokens: offsets is empty; n sequences have n + 1 offsets")
    if side not in ("right", "left"):
        raise ValueError(f"pad_tokens: side must be right or left, not {side!r}")
    longest = _longest(version, flat, offsets)
    if width is None:
        width = longest if out is None else _columns(ids)
    if width is None:
        raise ValueError("pad_tokens: say width= or out=; the longest sequence on a GPU is not known without waiting")
    if width < 0:
        raise ValueError(f"pad_tokens: width must be 0 or more, not {width}")
    if longest is not None and longest > width and not truncate:
        raise ValueError(f"pad_tokens: a sequence of {longest} tokens in {width} columns; widen, or truncate=True")
    shape = (offsets.size - 1, width)
    if out is None:
        ids, mask = arrays.empty(flat, shape, arrays.INT64, stream), arrays.empty(flat, shape, arrays.INT64, stream)
    arrays.expect_output("pad_tokens", "out[0]", ids, shape, arrays.INT32, arrays.INT64)
    arrays.expect_output("pad_tokens", "out[1]", mask, shape, arrays.INT32, arrays.INT64)
    _check_range(flat, ids, pad_id)
    version.run(flat, offsets, pad_id, side == "left", ids, mask, stream)
    return ids, mask


def _columns(ids: Any) -> int:
    if ids.ndim != 2:
        raise ValueError(f"pad_tokens: out[0] must have shape [n, width], not {list(ids.shape)}")
    return int(ids.shape[1])


def _longest(version: Any, flat: Any, offsets: Any) -> Any:
    """Return the length of the longest sequence; None on a GPU."""
    longest, bad = version.survey(offsets, flat.size)
    if bad >= 0:
        begin, end = offsets[bad].item(), offsets[min(bad + 1, offsets.size - 1)].item()
        raise ValueError(f"pad_tokens: sequence {bad} is flat[{begin}:{end}], and flat has {flat.size} tokens")
    return longest


def _check_range(flat: Any, ids: Any, pad_id: int) -> None:
    if ids.dtype.itemsize < flat.dtype.itemsize:
        raise TypeError(f"pad_tokens: out[0] is {ids.dtype}, which cannot hold every id of {flat.dtype}")
    if not -_BEYOND[ids.dtype] <= pad_id < _BEYOND[ids.dtype]:
        raise ValueError(f"pad_tokens: pad_id {pad_id} is outside of {ids.dtype}")


def warm_up() -> None:
    """Compile every variant of the chosen backend."""
    offsets = arrays.at_choice(np.array([0, 1], np.int64))
    for tokens in ("int32", "int64"):
        for ids in ("int32", "int64")[tokens == "int64" :]:
            for mask in ("int32", "int64"):
                out = arrays.at_choice(np.empty((1, 2), ids)), arrays.at_choice(np.empty((1, 2), mask))
                pad_tokens(arrays.at_choice(np.zeros(1, tokens)), offsets, out=out)
