"""Ragged token sequences as one padded batch and its attention mask.

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
    """Token ids [n, width], padded, and their mask: 1 for a token, 0 for padding.

    Args:
        flat: [t] int32 or int64, the sequences one after the other.
        offsets: [n + 1] int64, 0 <= offsets[0] <= offsets[1] <= ... <= t. What lies before the first and behind the
            last is not read.
        width: the columns of the batch. When None: those of `out`, else the longest sequence's length, which only the
            host can know without waiting.
        pad_id: fills the rest of a row.
        side: where the padding is. Decoders that go on from the last token want it left.
        truncate: cut longer sequences after `width` tokens; else they are an error.
        out: ids and mask, both [n, width] and each int32 or int64 (ids not narrower than `flat`). Allocated as int64
            when None, which is what exported models take.
        stream: the `cupy.cuda.Stream` to run on, CuPy's current one when None. Nothing waits for it.

    Returns:
        ids and mask: `out`.

    Raises:
        ValueError: offsets that are out of order or outside of `flat`, a sequence longer than `width`, a `pad_id` that
            the ids' dtype cannot hold, a wrong shape. On a GPU offsets cannot be looked at without waiting: there
            sequences are cut to what is in `flat` and to `width`, so that nothing outside of the arrays is touched.
        TypeError: a wrong dtype, or host and device arrays in one call.
    """
    ids, mask = out or (None, None)
    version = OPERATION.version(stream, flat=flat, offsets=offsets, ids=ids, mask=mask)
    arrays.expect("pad_tokens", "flat", flat, ("tokens",), "int32", "int64")
    arrays.expect("pad_tokens", "offsets", offsets, ("n + 1",), "int64")
    if not offsets.size:
        raise ValueError("pad_tokens: offsets is empty; n sequences have n + 1 offsets")
    if side not in ("right", "left"):
        raise ValueError(f"pad_tokens: side must be right or left, not {side!r}")
    longest = _longest(version, flat, offsets)
    if width is None:
        width = longest if out is None else _columns(ids)
    if width is None:
        raise ValueError("pad_tokens: say width= or out=; the longest sequence on a GPU is not known without waiting")
    if longest is not None and longest > width and not truncate:
        raise ValueError(f"pad_tokens: a sequence of {longest} tokens in {width} columns; widen, or truncate=True")
    shape = (offsets.size - 1, width)
    if out is None:
        ids, mask = arrays.empty(flat, shape, "int64", stream), arrays.empty(flat, shape, "int64", stream)
    arrays.expect_output("pad_tokens", "out[0]", ids, shape, "int32", "int64")
    arrays.expect_output("pad_tokens", "out[1]", mask, shape, "int32", "int64")
    _check_range(flat, ids, pad_id)
    version.run(flat, offsets, pad_id, side == "left", ids, mask, stream)
    return ids, mask


def _columns(ids: Any) -> int:
    if ids.ndim != 2:
        raise ValueError(f"pad_tokens: out[0] must have shape [n, width], not {list(ids.shape)}")
    return int(ids.shape[1])


def _longest(version: Any, flat: Any, offsets: Any) -> Any:
    """The longest sequence; None on a GPU."""
    longest, bad = version.survey(offsets, flat.size)
    if bad >= 0:
        begin, end = offsets[bad].item(), offsets[min(bad + 1, offsets.size - 1)].item()
        raise ValueError(f"pad_tokens: sequence {bad} is flat[{begin}:{end}], and flat has {flat.size} tokens")
    return longest


def _check_range(flat: Any, ids: Any, pad_id: int) -> None:
    if ids.dtype.itemsize < flat.dtype.itemsize:
        raise TypeError(f"pad_tokens: out[0] is {ids.dtype}, which cannot hold every id of {flat.dtype}")
    bounds = np.iinfo(ids.dtype)
    if not bounds.min <= pad_id <= bounds.max:
        raise ValueError(f"pad_tokens: pad_id {pad_id} is outside of {ids.dtype}")


def warm_up() -> None:
    """Compiles what a call would compile."""
    offsets = arrays.at_choice(np.array([0, 1], np.int64))
    for tokens in ("int32", "int64"):
        for ids in ("int32", "int64")[tokens == "int64" :]:
            for mask in ("int32", "int64"):
                out = arrays.at_choice(np.empty((1, 2), ids)), arrays.at_choice(np.empty((1, 2), mask))
                pad_tokens(arrays.at_choice(np.zeros(1, tokens)), offsets, out=out)
