"""softmax_topk on a GPU: one block of threads for each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kernels.cuda_source import CudaSource

KERNELS = {"float32": "softmax_topk<float>", "float16": "softmax_topk<__half>"}
SOURCE = CudaSource(Path(__file__).with_name("softmax_topk.cu"), tuple(KERNELS.values()), registers=48)
WARP, MOST_THREADS = 32, 256


def run(logits: Any, probabilities: Any, indices: Any, stream: Any = None) -> None:
    n, m = logits.shape
    threads = min(-(-m // WARP) * WARP, MOST_THREADS)
    arguments = (logits, probabilities, indices, np.int32(m), np.int32(indices.shape[1]))
    SOURCE.launch(KERNELS[logits.dtype.name], (n, 1, 1), (threads, 1, 1), arguments, 0, stream)
