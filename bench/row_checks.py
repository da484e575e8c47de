"""Comparisons of `gpu_checks.py` for the operations on rows. A tolerance of 0 requires equal results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kernels.nms import nms
from kernels.pad_tokens import pad_tokens
from kernels.pool_normalize import l2_normalize, pool_normalize
from kernels.quantize_rows import dequantize_rows, quantize_rows
from kernels.softmax_topk import softmax_topk
from kernels.tabular import columns, tabular

Found = tuple[str, float, float]


def off(made: Any, expected: np.ndarray) -> float:
    """Return the largest difference; infinite if shapes, NaN or infinities differ."""
    got = np.asarray(made, np.float64)
    if got.shape != expected.shape or not np.array_equal(np.isfinite(got), np.isfinite(expected)):
        return float("inf")
    finite = np.isfinite(got)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(got[finite] - expected[finite]).max(initial=0))


def pad_tokens_checks(rng: np.random.Generator, cupy: Any) -> Iterator[Found]:
    for side in ("right", "left"):
        for tokens, ids in ((np.int32, np.int32), (np.int32, np.int64), (np.int64, np.int64)):
            lengths = rng.integers(0, 700, int(rng.integers(1, 300)))
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            flat = rng.integers(-9, 2**31 - 1, offsets[-1]).astype(tokens)
            shape = (lengths.size, int(rng.integers(1, 700)))
            options: Any = {"side": side, "pad_id": -7, "truncate": True}
            out = cupy.full(shape, 77, ids), cupy.full(shape, 77, np.int64)
            pad_tokens(cupy.asarray(flat), cupy.asarray(offsets), out=out, **options)
            expected = pad_tokens(flat, offsets, out=(np.empty(shape, ids), np.empty(shape, np.int64)), **options)
            worst = max(off(cupy.asnumpy(made), want) for made, want in zip(out, expected, strict=True))
            yield f"{np.dtype(tokens)} to {np.dtype(ids)}, {side}, {list(shape)}", worst, 0.0
    wild = np.array([[-5, 2**62], [2**62, -(2**62)], [30, 10]])
    for offsets in wild:
        ids, mask = pad_tokens(cupy.arange(20, dtype=np.int32), cupy.asarray(offsets), width=64, truncate=True)
        inside = cupy.asnumpy(mask).sum() <= 20 and cupy.asnumpy(ids).max() < 20
        yield f"offsets {offsets.tolist()} read nothing outside", 0.0 if inside else 1.0, 0.0


def tabular_checks(rng: np.random.Generator, cupy: Any) -> Iterator[Found]:
    for dtype in (np.float32, np.float64):
        for code in (np.int32, np.int64):
            f, sizes, n = int(rng.integers(0, 50)), rng.integers(0, 40, 7), int(rng.integers(1, 5000))
            made = columns(
                mean=rng.normal(size=f),
                std=rng.uniform(0.5, 2, f),
                fill=rng.normal(size=f),
                categories=[rng.permutation(3 * size)[:size] for size in sizes],
                dtype=np.dtype(dtype).name,
            )
            numbers = np.where(rng.uniform(size=(n, f)) < 0.2, np.nan, rng.normal(size=(n, f))).astype(dtype)
            codes = rng.integers(-1, 120, (n, 7)).astype(code)
            out = cupy.full((n, made.width), np.nan, np.float32)
            tabular(made.on_device(), cupy.asarray(numbers), cupy.asarray(codes), out=out)
            # Two roundings of values below 20.
            yield f"{np.dtype(dtype)}, {np.dtype(code)}", off(cupy.asnumpy(out), tabular(made, numbers, codes)), 4e-6


def pool_normalize_checks(rng: np.random.Generator, cupy: Any) -> Iterator[Found]:
    """Compare unit vectors. A sum over tokens rounds up to 600 times, by at most 2^-24 of the sum, in any order."""
    for dtype in (np.float32, np.float16):
        for mask_dtype in (np.int64, np.int32, np.bool_):
            n, t, d = (int(rng.integers(1, most)) for most in (40, 600, 1100))
            tokens = (rng.uniform(0.5, 1.5, (n, t, d)) * rng.choice([-1, 1], d)).astype(dtype)
            mask = (rng.uniform(size=(n, t)) < 0.6).astype(mask_dtype)
            mask[0] = 0
            out = cupy.full((n, d), np.nan, np.float32)
            pool_normalize(cupy.asarray(tokens), cupy.asarray(mask), out=out)
            what = f"{np.dtype(dtype)}, mask {np.dtype(mask_dtype)}, {[n, t, d]}"
            yield what, off(cupy.asnumpy(out), pool_normalize(tokens, mask)), 4e-5
        x = rng.normal(size=(int(rng.integers(1, 300)), int(rng.integers(1, 3000)))).astype(dtype)
        made = l2_normalize(cupy.asarray(x))
        yield f"l2_normalize {np.dtype(dtype)} {list(x.shape)}", off(cupy.asnumpy(made), l2_normalize(x)), 1e-5


def softmax_topk_checks(rng: np.random.Generator, cupy: Any) -> Iterator[Found]:
    for dtype in (np.float32, np.float16):
        for n, m, k in ((64, 1000, 5), (3, 50_257, 50), (100, 10, 10), (5, int(rng.integers(1, 5000)), 20)):
            logits = rng.normal(0, 4, (n, m)).astype(dtype)
            logits[-1, ::3] = rng.choice([np.nan, np.inf, -np.inf, 0.0])
            made, expected = softmax_topk(cupy.asarray(logits), k), softmax_topk(logits, k)
            what = f"{np.dtype(dtype)} {[n, m]}, best {k}"
            yield f"{what}: probabilities", off(cupy.asnumpy(made[0]), expected[0]), 4e-4 if m > 5000 else 1e-5
            yield f"{what}: indices", off(cupy.asnumpy(made[1]), expected[1]), 0.0


def quantize_rows_checks(rng: np.random.Generator, cupy: Any) -> Iterator[Found]:
    shape = (int(rng.integers(1, 300)), int(rng.integers(1, 3000)))
    usual = (rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, (shape[0], 1))).astype(np.float32)
    any_bits = rng.integers(0, 2**32, (500, 7), np.uint32).view(np.float32)
    for name, x in (("rows of all sizes", usual), ("any bits", any_bits)):
        made, expected = quantize_rows(cupy.asarray(x)), quantize_rows(x)
        yield f"{name}: numbers", off(cupy.asnumpy(made[0]), expected[0]), 0.0
        yield f"{name}: scales", off(cupy.asnumpy(made[1]), expected[1]), 0.0
        back = cupy.asnumpy(dequantize_rows(*made))
        yield f"{name}: and back", off(back, dequantize_rows(*expected)), 0.0


def nms_checks(rng: np.random.Generator, cupy: Any) -> Iterator[Found]:
    for m in (1, 64, 700, 3000):
        corner = rng.uniform(0, 300, (m, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(1, 100, (m, 2))], axis=1).astype(np.float32)
        boxes[m // 2 :] = boxes[m // 2 :].round()
        scores = (rng.integers(0, 500, m) / 500).astype(np.float32)
        scores[::17] = np.nan
        for groups in (None, rng.integers(0, 4, m).astype(np.int32)):
            for most in (m, 50):
                device_groups = None if groups is None else cupy.asarray(groups)
                out = cupy.full(most, 77, np.int64)
                nms(cupy.asarray(boxes), cupy.asarray(scores), 0.4, groups=device_groups, out=out)
                expected = np.full(most, -1, np.int64)
                kept = nms(boxes, scores, 0.4, groups=groups, out=np.empty(most, np.int64))
                expected[: kept.size] = kept
                yield f"{m} boxes, groups {groups is not None}, best {most}", off(cupy.asnumpy(out), expected), 0.0
