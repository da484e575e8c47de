"""Cases of `kernels_cpu.py` for postprocessing operations: ours, and the usual alternatives of a user."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from side_by_side import Case, Runs, compared, onnx_model, peer, session

from kernels.nms import nms
from kernels.pool_normalize import l2_normalize, pool_normalize
from kernels.quantize_rows import dequantize_rows, quantize_rows
from kernels.softmax_topk import softmax_topk


def pool_normalize_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    torch, sklearn = peer("torch"), peer("sklearn.preprocessing")
    for n, t, d in ((1, 32, 384), (32, 128, 384), (8, 512, 1024)):
        tokens = rng.normal(size=(n, t, d)).astype(np.float32)
        mask = (np.arange(t) < rng.integers(t // 4, t + 1, n)[:, None]).astype(np.int64)
        out = np.empty((n, d), np.float32)
        runs: Runs = {
            "shoal": partial(pool_normalize, tokens, mask, out=out),
            "NumPy": partial(_pool_numpy, tokens, mask),
        }
        if torch is not None:
            runs["PyTorch"] = partial(_pool_torch, torch, torch.from_numpy(tokens), torch.from_numpy(mask))
        yield compared(f"pool_normalize: {n} texts of {t} tokens, {d} wide, 0.6 of them unmasked", n, "texts", runs)
    for n in (32, 1024):
        x = rng.normal(size=(n, 768)).astype(np.float32)
        runs = {
            "shoal": partial(l2_normalize, x, out=np.empty_like(x)),
            "NumPy": lambda x=x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12),
        }
        if torch is not None:
            runs["PyTorch normalize"] = partial(torch.nn.functional.normalize, torch.from_numpy(x), dim=1)
        if sklearn is not None:
            runs["scikit-learn normalize"] = partial(sklearn.normalize, x)
        yield compared(f"l2_normalize: {n} rows of 768", n, "rows", runs)


def _pool_numpy(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = mask[:, :, None].astype(np.float32)
    pooled = (tokens * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
    return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


def _pool_torch(torch: Any, tokens: Any, mask: Any) -> Any:
    weights = mask.unsqueeze(-1).float()
    pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=1)


def softmax_topk_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    torch = peer("torch")
    for n, m, k in ((1, 1000, 5), (32, 1000, 5), (256, 1000, 5), (32, 1000, 100), (4, 50_257, 50)):
        logits = rng.normal(0, 3, (n, m)).astype(np.float32)
        out = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
        runs: Runs = {
            "shoal": partial(softmax_topk, logits, k, out=out),
            "NumPy": partial(_softmax_numpy, logits, k),
        }
        if torch is not None:
            runs["PyTorch softmax, topk"] = partial(_softmax_torch, torch, torch.from_numpy(logits), k)
        if peer("onnx") is not None and peer("onnxruntime") is not None:
            runs["ONNX Runtime Softmax, TopK"] = partial(session(_softmax_model(k)).run, None, {"x": logits})
        yield compared(f"softmax_topk: {n} rows of {m:,}, the best {k}", n, "rows", runs)


def _softmax_numpy(logits: np.ndarray, k: int) -> Any:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = powers / powers.sum(axis=1, keepdims=True)
    some = np.argpartition(-softmax, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(softmax, some, axis=1)
    order = np.argsort(-values, axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(some, order, axis=1)


def _softmax_torch(torch: Any, logits: Any, k: int) -> Any:
    return tuple(torch.softmax(logits, 1).topk(k, 1))


def _softmax_model(k: int) -> bytes:
    make, numbers = peer("onnx").helper, peer("onnx").numpy_helper.from_array
    return onnx_model(
        [make.make_node("Softmax", ["x"], ["p"]), make.make_node("TopK", ["p", "k"], ["values", "indices"])],
        [make.make_tensor_value_info("x", 1, ["n", "m"])],
        [make.make_tensor_value_info("values", 1, ["n", "k"]), make.make_tensor_value_info("indices", 7, ["n", "k"])],
        [numbers(np.array([k]), "k")],
    )


def quantize_rows_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    torch = peer("torch")
    for n in (1, 32, 1024):
        x = rng.normal(size=(n, 768)).astype(np.float32)
        numbers, scales = quantize_rows(x)
        forward: Runs = {
            "shoal": partial(quantize_rows, x, out=(np.empty_like(numbers), np.empty_like(scales))),
            "NumPy": partial(_quantize_numpy, x),
        }
        backward: Runs = {
            "shoal": partial(dequantize_rows, numbers, scales, out=np.empty_like(x)),
            "NumPy": lambda numbers=numbers, scales=scales: numbers * scales[:, None],
        }
        if torch is not None:
            forward["PyTorch"] = partial(_quantize_torch, torch.from_numpy(x))
            pair = torch.from_numpy(numbers), torch.from_numpy(scales)
            backward["PyTorch"] = lambda pair=pair: pair[0] * pair[1][:, None]
        yield compared(f"quantize_rows: {n} rows of 768 to int8", n, "rows", forward)
        yield compared(f"dequantize_rows: {n} rows of 768 back", n, "rows", backward)


def _quantize_numpy(x: np.ndarray) -> Any:
    scales = np.abs(x).max(axis=1) / np.float32(127)
    return np.rint(x / scales[:, None]).astype(np.int8), scales


def _quantize_torch(x: Any) -> Any:
    scales = x.abs().amax(1) / 127
    return (x / scales[:, None]).round().to(dtype=peer("torch").int8), scales


def nms_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for m in (100, 300, 1000, 2000, 8400):
        for kind, boxes in (("scattered", _scattered(rng, m)), ("20 for each object", _clustered(rng, m))):
            scores = (rng.permutation(m) + 1).astype(np.float32) / m
            runs: Runs = {"shoal": partial(nms, boxes, scores, 0.5, out=np.empty(m, np.int64))}
            kept = len(runs["shoal"]())
            runs |= _nms_peers(boxes, scores)
            yield compared(f"nms: {m:,} boxes, {kind}, {kept:,} kept", m, "boxes", runs)


def _scattered(rng: np.random.Generator, m: int) -> np.ndarray:
    centre, size = rng.uniform(0, 640, (m, 2)), rng.uniform(10, 100, (m, 2))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)


def _clustered(rng: np.random.Generator, m: int) -> np.ndarray:
    """Return boxes such as a detector's: many around each object, a few pixels apart."""
    objects = _scattered(rng, max(m // 20, 1))
    boxes = objects[rng.integers(0, len(objects), m)] + rng.normal(0, 3, (m, 4))
    return boxes.astype(np.float32)


def _nms_peers(boxes: np.ndarray, scores: np.ndarray) -> Runs:
    runs: Runs = {}
    torch, torchvision, cv2 = peer("torch"), peer("torchvision"), peer("cv2")
    if torchvision is not None:
        runs["torchvision"] = partial(torchvision.ops.nms, torch.from_numpy(boxes), torch.from_numpy(scores), 0.5)
    if peer("onnx") is not None and peer("onnxruntime") is not None:
        make, numbers = peer("onnx").helper, peer("onnx").numpy_helper.from_array
        model = onnx_model(
            [
                make.make_node("NonMaxSuppression", ["boxes", "scores", "most", "threshold"], ["found"]),
                make.make_node("Gather", ["found", "column"], ["kept"], axis=1),
            ],
            [make.make_tensor_value_info(name, 1, [1, "a", "b"]) for name in ("boxes", "scores")],
            [make.make_tensor_value_info("kept", 7, ["n"])],
            [
                numbers(np.array([len(boxes)]), "most"),
                numbers(np.array([0.5], np.float32), "threshold"),
                numbers(np.array(2), "column"),
            ],
        )
        runs["ONNX Runtime"] = partial(session(model).run, None, {"boxes": boxes[None], "scores": scores[None, None]})
    # With more boxes a run takes half a second.
    if cv2 is not None and len(boxes) <= 2000:
        wide = boxes.copy()
        wide[:, 2:] -= wide[:, :2]
        runs["OpenCV NMSBoxes"] = lambda: cv2.dnn.NMSBoxes(wide, scores, 0.0, 0.5)
    runs["NumPy, the usual loop"] = partial(_nms_numpy, boxes, scores)
    return runs


def _nms_numpy(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1) * (y2 - y1)
    order = np.argsort(-scores, kind="stable")
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        w = np.minimum(x2[best], x2[rest]) - np.maximum(x1[best], x1[rest])
        h = np.minimum(y2[best], y2[rest]) - np.maximum(y1[best], y1[rest])
        both = np.maximum(w, 0) * np.maximum(h, 0)
        order = rest[both / (areas[best] + areas[rest] - both) <= 0.5]
    return np.array(kept)
