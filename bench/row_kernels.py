"""What `kernels_cpu.py` compares for the operations on rows: the work, and how a user would do it otherwise."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from side_by_side import Case, peer

from kernels.nms import nms
from kernels.pad_tokens import pad_tokens
from kernels.pool_normalize import l2_normalize, pool_normalize
from kernels.quantize_rows import dequantize_rows, quantize_rows
from kernels.softmax_topk import softmax_topk
from kernels.tabular import columns, tabular

Runs = dict[str, Callable[[], Any]]


def case(title: str, items: int, item: str, runs: Runs) -> Case:
    """With how far each result is from ours, where it has the same shape."""
    results = {name: _first(run()) for name, run in runs.items()}
    ours = results["shoal"]
    notes = {name: _difference(ours, result) for name, result in results.items() if name != "shoal"}
    return Case(title, items, item, runs, notes)


def _first(result: Any) -> np.ndarray:
    """The numbers of a result; in front of others where it is a tuple."""
    array = np.asarray(result[0] if isinstance(result, tuple | list) else result)
    return array.copy()


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        return f"another shape: {list(theirs.shape)}"
    if np.array_equal(ours, theirs):
        return "equal to ours"
    return f"differs from ours by {np.abs(ours.astype(np.float64) - theirs).max():.1e} at most"


def _session(nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: list[Any]) -> Any:
    onnx, ort = peer("onnx"), peer("onnxruntime")
    make = onnx.helper
    graph = make.make_graph(nodes, "peer", inputs, outputs, initializers)
    data = io.BytesIO()
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9), data)
    return ort_session(ort, data.getvalue())


def ort_session(ort: Any, model: bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# pad_tokens


def pad_tokens_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for n, most in ((1, 24), (32, 128), (256, 512)):
        lengths = rng.integers(5, most + 1, n)
        lengths[0] = most
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = rng.integers(0, 30_000, offsets[-1]).astype(np.int32)
        parts = np.split(flat, offsets[1:-1])
        out = np.empty((n, most), np.int64), np.empty((n, most), np.int64)
        runs: Runs = {
            "shoal": partial(pad_tokens, flat, offsets, out=out),
            "shoal, from a list of arrays": partial(_pad_list, parts, out),
            "NumPy, row by row": partial(_pad_loop, parts, out),
            "NumPy, by a mask": partial(_pad_by_mask, flat, lengths, most),
        }
        torch = peer("torch")
        if torch is not None:
            runs["PyTorch pad_sequence"] = partial(_pad_torch, torch, [torch.from_numpy(part) for part in parts])
        yield case(f"pad_tokens: {n} sequences of 5 to {most} tokens, int64 ids and mask", n, "sequences", runs)


def _pad_list(parts: list[np.ndarray], out: Any) -> Any:
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([part.size for part in parts], out=offsets[1:])
    return pad_tokens(np.concatenate(parts), offsets, out=out)


def _pad_loop(parts: list[np.ndarray], out: Any) -> Any:
    ids, mask = out
    ids[:], mask[:] = 0, 0
    for i, part in enumerate(parts):
        ids[i, : part.size] = part
        mask[i, : part.size] = 1
    return out


def _pad_by_mask(flat: np.ndarray, lengths: np.ndarray, width: int) -> Any:
    counts = np.arange(width) < lengths[:, None]
    ids = np.zeros(counts.shape, np.int64)
    ids[counts] = flat
    return ids, counts.astype(np.int64)


def _pad_torch(torch: Any, parts: list[Any]) -> Any:
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).long()
    lengths = torch.tensor([part.numel() for part in parts])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


# tabular


def tabular_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    fitted = rng.normal(size=(1000, 20)).astype(np.float32), rng.integers(0, 10, (1000, 10))
    sklearn = _Sklearn(*fitted) if peer("sklearn") is not None else None
    made = columns(
        fill=np.zeros(20), mean=fitted[0].mean(axis=0), std=fitted[0].std(axis=0), categories=[range(10)] * 10
    )
    if sklearn is not None:
        made = sklearn.columns()
    for n in (1, 64, 1024):
        numbers = np.where(rng.uniform(size=(n, 20)) < 0.1, np.nan, rng.normal(size=(n, 20))).astype(np.float32)
        codes = rng.integers(0, 10, (n, 10))
        out = np.empty((n, made.width), np.float32)
        runs: Runs = {
            "shoal": partial(tabular, made, numbers, codes, out=out),
            "NumPy": partial(_tabular_numpy, made, numbers, codes, out),
        }
        if sklearn is not None:
            runs |= sklearn.runs(numbers, codes)
        yield case(f"tabular: {n} rows, 20 numbers (a tenth missing), 10 categories of 10 values", n, "rows", runs)


def _tabular_numpy(made: Any, numbers: np.ndarray, codes: np.ndarray, out: np.ndarray) -> np.ndarray:
    filled = np.where(np.isnan(numbers), made.fill, numbers)
    np.multiply(filled - made.mean, made.scale, out=out[:, :20])
    np.equal(codes[:, :, None], np.arange(10), out=out[:, 20:].reshape(len(codes), 10, 10), casting="unsafe")
    return out


class _Sklearn:
    """scikit-learn's pipeline, and the same as ONNX."""

    def __init__(self, numbers: np.ndarray, codes: np.ndarray) -> None:
        compose, impute = peer("sklearn.compose"), peer("sklearn.impute")
        preprocessing, pipeline = peer("sklearn.preprocessing"), peer("sklearn.pipeline")
        self.imputer, self.scaler = impute.SimpleImputer(), preprocessing.StandardScaler()
        self.encoder = preprocessing.OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
        numeric = pipeline.make_pipeline(self.imputer, self.scaler)
        self.transformer = compose.ColumnTransformer(
            [("n", numeric, list(range(20))), ("c", self.encoder, list(range(20, 30)))]
        ).fit(np.concatenate([numbers, codes], axis=1))

    def columns(self) -> Any:
        numeric = self.transformer.named_transformers_["n"]
        return columns(
            fill=numeric[0].statistics_,
            mean=numeric[1].mean_,
            std=numeric[1].scale_,
            categories=self.transformer.named_transformers_["c"].categories_,
        )

    def runs(self, numbers: np.ndarray, codes: np.ndarray) -> Runs:
        both = np.concatenate([numbers, codes], axis=1).astype(np.float32)
        runs: Runs = {"scikit-learn ColumnTransformer": partial(self.transformer.transform, both)}
        skl2onnx, ort = peer("skl2onnx"), peer("onnxruntime")
        if skl2onnx is not None and ort is not None:
            floats = peer("skl2onnx.common.data_types").FloatTensorType
            model = skl2onnx.convert_sklearn(self.transformer, initial_types=[("x", floats([None, 30]))])
            session = ort_session(ort, model.SerializeToString())
            runs["ONNX Runtime, by skl2onnx"] = partial(session.run, None, {"x": both})
        return runs


# pool_normalize


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
        yield case(f"pool_normalize: {n} texts of {t} tokens, {d} wide, 0.6 of them counted", n, "texts", runs)
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
        yield case(f"l2_normalize: {n} rows of 768", n, "rows", runs)


def _pool_numpy(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = mask[:, :, None].astype(np.float32)
    pooled = (tokens * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
    return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


def _pool_torch(torch: Any, tokens: Any, mask: Any) -> Any:
    weights = mask.unsqueeze(-1).float()
    pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=1)


# softmax_topk


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
            session = _softmax_session(k)
            runs["ONNX Runtime Softmax, TopK"] = partial(session.run, None, {"x": logits})
        yield case(f"softmax_topk: {n} rows of {m:,}, the best {k}", n, "rows", runs)


def _softmax_numpy(logits: np.ndarray, k: int) -> Any:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = powers / powers.sum(axis=1, keepdims=True)
    some = np.argpartition(-softmax, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(softmax, some, axis=1)
    order = np.argsort(-values, axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(some, order, axis=1)


def _softmax_torch(torch: Any, logits: Any, k: int) -> Any:
    return tuple(torch.softmax(logits, 1).topk(k, 1))


def _softmax_session(k: int) -> Any:
    make, numbers = peer("onnx").helper, peer("onnx").numpy_helper.from_array
    return _session(
        [make.make_node("Softmax", ["x"], ["p"]), make.make_node("TopK", ["p", "k"], ["values", "indices"])],
        [make.make_tensor_value_info("x", 1, ["n", "m"])],
        [make.make_tensor_value_info("values", 1, ["n", "k"]), make.make_tensor_value_info("indices", 7, ["n", "k"])],
        [numbers(np.array([k]), "k")],
    )


# quantize_rows


def quantize_rows_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    torch = peer("torch")
    for n in (1, 32, 1024):
        x = rng.normal(size=(n, 768)).astype(np.float32)
        numbers, scales = quantize_rows(x)
        there: Runs = {
            "shoal": partial(quantize_rows, x, out=(np.empty_like(numbers), np.empty_like(scales))),
            "NumPy": partial(_quantize_numpy, x),
        }
        back: Runs = {
            "shoal": partial(dequantize_rows, numbers, scales, out=np.empty_like(x)),
            "NumPy": lambda numbers=numbers, scales=scales: numbers * scales[:, None],
        }
        if torch is not None:
            there["PyTorch"] = partial(_quantize_torch, torch.from_numpy(x))
            pair = torch.from_numpy(numbers), torch.from_numpy(scales)
            back["PyTorch"] = lambda pair=pair: pair[0] * pair[1][:, None]
        yield case(f"quantize_rows: {n} rows of 768 to int8", n, "rows", there)
        yield case(f"dequantize_rows: {n} rows of 768 back", n, "rows", back)


def _quantize_numpy(x: np.ndarray) -> Any:
    scales = np.abs(x).max(axis=1) / np.float32(127)
    return np.rint(x / scales[:, None]).astype(np.int8), scales


def _quantize_torch(x: Any) -> Any:
    scales = x.abs().amax(1) / 127
    return (x / scales[:, None]).round().to(dtype=peer("torch").int8), scales


# nms


def nms_cases(threads: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for m in (100, 300, 1000, 2000, 8400):
        for kind, boxes in (("scattered", _scattered(rng, m)), ("20 for each object", _clustered(rng, m))):
            scores = rng.permutation(m).astype(np.float32) / m
            runs: Runs = {"shoal": partial(nms, boxes, scores, 0.5, out=np.empty(m, np.int64))}
            kept = len(runs["shoal"]())
            runs |= _nms_peers(boxes, scores)
            yield case(f"nms: {m:,} boxes, {kind}, {kept:,} kept", m, "boxes", runs)


def _scattered(rng: np.random.Generator, m: int) -> np.ndarray:
    centre, size = rng.uniform(0, 640, (m, 2)), rng.uniform(10, 100, (m, 2))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)


def _clustered(rng: np.random.Generator, m: int) -> np.ndarray:
    """What a detector puts out: many boxes about each object, a few pixels apart."""
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
        session = _session(
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
        runs["ONNX Runtime"] = partial(session.run, None, {"boxes": boxes[None], "scores": scores[None, None]})
    if cv2 is not None and len(boxes) <= 2000:  # Half a second a run above.
        wide = boxes.copy()
        wide[:, 2:] -= wide[:, :2]
        runs["OpenCV NMSBoxes"] = lambda: cv2.dnn.NMSBoxes(wide, scores, -1.0, 0.5)
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
