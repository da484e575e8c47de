"""Reference version of pad_tokens, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def survey(offsets: Array, size: int) -> tuple[int, int]:
    """Return the length of the longest sequence, and the index of the first invalid one or -1."""
    begin, end = offsets[:-1], offsets[1:]
    bad = np.flatnonzero((begin < 0) | (end < begin) | (end > size))
    if offsets.size == 1 and not 0 <= offsets[0] <= size:
        return 0, 0
    return int((end - begin).max(initial=0)), int(bad[0]) if bad.size else -1


def run(flat: Array, offsets: Array, pad_id: int, left: bool, ids: Array, mask: Array, stream: None = None) -> None:
    width = ids.shape[1]
    ids[:], mask[:] = pad_id, 0
    for i in range(ids.shape[0]):
        tokens = flat[offsets[i] : offsets[i + 1]][:width]
        columns = slice(width - tokens.size, width) if left else slice(tokens.size)
        ids[i, columns], mask[i, columns] = tokens, 1
