"""pool_normalize on a GPU: each block computes the means of 64 columns; a second launch normalises the rows.

A single launch would need one block per text, and 32 texts would use a quarter of an H100.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kernels.cuda_source import CudaSource

NUMBERS = {"float32": "float", "float16": "__half"}
MASKS = {"int64": "long long", "int32": "int", "bool": "bool"}
SOURCE = CudaSource(
    Path(__file__).with_name("pool_normalize.cu"),
    tuple(f"mean_of_tokens<{number}, {mask}>" for number in NUMBERS.values() for mask in MASKS.values())
    + tuple(f"l2_normalize<{number}>" for number in NUMBERS.values()),
    registers=40,
)
# Equal to the constants in pool_normalize.cu.
COLUMNS, SPLITS = 64, 4
THREADS = 128


def pool(tokens: Any, mask: Any, eps: np.float32, normalize: bool, out: Any, stream: Any = None) -> None:
    n, t, d = tokens.shape
    kernel = f"mean_of_tokens<{NUMBERS[tokens.dtype.name]}, {MASKS[mask.dtype.name]}>"
    arguments = (tokens, mask, out, np.int32(t), np.int32(d))
    SOURCE.launch(kernel, (n, -(-d // COLUMNS), 1), (COLUMNS, SPLITS, 1), arguments, 0, stream)
    if normalize:
        l2(out, eps, out, stream)


def l2(x: Any, eps: np.float32, out: Any, stream: Any = None) -> None:
    n, d = x.shape
    kernel = f"l2_normalize<{NUMBERS[x.dtype.name]}>"
    SOURCE.launch(kernel, (n, 1, 1), (THREADS, 1, 1), (x, out, np.int32(d), eps), 0, stream)
