"""Comparison of kernels on a GPU with the CPU, on new random ragged batches.

    python bench/gpu_checks.py [SEED]

Each operation has one function, in this file or in `row_checks.py`. A program of its own, so that compute-sanitizer can
run it. Exits with 1 when the error of a result exceeds its tolerance.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from row_checks import (
    nms_checks,
    pad_tokens_checks,
    pool_normalize_checks,
    quantize_rows_checks,
    softmax_topk_checks,
    tabular_checks,
)

from kernels import backend
from kernels.resize_norm import pack, resize_norm

Found = tuple[str, float, float]
"""The name of a comparison, the largest error, and the tolerance."""


def resize_norm_checks(rng: np.random.Generator, cupy: Any) -> Iterator[Found]:
    """Compare resize_norm in grey levels, with the tolerances of tests/kernels/test_resize_norm.py."""
    for dtype, allowed in ((np.float32, 0.02), (np.float16, 0.2), (np.uint8, 1.0)):
        for layout in ("CHW", "HWC"):
            for antialias in (True, False):
                channels = int(rng.choice([1, 3]))
                sides = rng.integers(1, 700, (12, 2))
                # Rows of a multiple of 16 bytes.
                sides[:3, 1] = 16 * rng.integers(1, 80, 3)
                images = [rng.integers(0, 256, (int(h), int(w), channels), dtype=np.uint8) for h, w in sides]
                boxes = [_box(rng, *image.shape[:2]) if rng.random() < 0.5 else None for image in images]
                size = (int(rng.integers(1, 230)), int(rng.integers(1, 230)))
                packed = pack(images, size, boxes)
                on_device = packed.moved(cupy.asarray)
                shape = (12, channels, *size) if layout == "CHW" else (12, *size, channels)
                out = cupy.full(shape, 77, dtype)
                resize_norm(on_device, out, layout=layout, antialias=antialias, channels=channels)
                expected = resize_norm(
                    packed, np.empty(shape, np.float32), layout=layout, antialias=antialias, channels=channels
                )
                made = out.get().astype(np.float64) * (1 if dtype == np.uint8 else 255)
                yield (
                    f"{np.dtype(dtype)} {layout} antialias={antialias}",
                    float(np.abs(made - 255 * expected).max()),
                    allowed,
                )


def _box(rng: np.random.Generator, height: int, width: int) -> tuple[float, float, float, float]:
    y0, x0 = rng.uniform(0, height - 0.5), rng.uniform(0, width - 0.5)
    return y0, x0, rng.uniform(y0 + 0.4, height), rng.uniform(x0 + 0.4, width)


CHECKS: dict[str, Callable[[np.random.Generator, Any], Iterator[Found]]] = {
    "resize_norm": resize_norm_checks,
    "pad_tokens": pad_tokens_checks,
    "tabular": tabular_checks,
    "pool_normalize": pool_normalize_checks,
    "softmax_topk": softmax_topk_checks,
    "quantize_rows": quantize_rows_checks,
    "nms": nms_checks,
}


def run(seed: int) -> Iterator[tuple[str, Found]]:
    import cupy

    for operation, checks in CHECKS.items():
        for found in checks(np.random.default_rng(seed), cupy):
            yield operation, found


def main() -> None:
    if not backend.device_available():
        sys.exit(f"bench/gpu_checks.py: {backend.why_no_device()}")
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else time.time_ns() % 2**32
    wrong = 0
    for operation, (what, off, allowed) in run(seed):
        bad = not off <= allowed
        wrong += bad
        verdict = "WRONG" if bad else "right"
        print(f"{verdict}  {operation}: {what}: error {off:.4f}, tolerance {allowed} (seed {seed})")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
