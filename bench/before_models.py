"""Cases of `kernels_cpu.py` for preprocessing operations: ours, and the usual alternatives of a user."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from side_by_side import Case, Runs, compared, peer, session

from kernels.pad_tokens import pad_tokens
from kernels.tabular import columns, tabular


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
        yield compared(f"pad_tokens: {n} sequences of 5 to {most} tokens, int64 ids and mask", n, "sequences", runs)


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
        yield compared(f"tabular: {n} rows, 20 numbers (a tenth missing), 10 categories of 10 values", n, "rows", runs)


def _tabular_numpy(made: Any, numbers: np.ndarray, codes: np.ndarray, out: np.ndarray) -> np.ndarray:
    filled = np.where(np.isnan(numbers), made.fill, numbers)
    np.multiply(filled - made.mean, made.scale, out=out[:, :20])
    np.equal(codes[:, :, None], np.arange(10), out=out[:, 20:].reshape(len(codes), 10, 10), casting="unsafe")
    return out


class _Sklearn:
    """scikit-learn's pipeline, and the same pipeline converted to ONNX."""

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
        skl2onnx = peer("skl2onnx")
        if skl2onnx is not None and peer("onnxruntime") is not None:
            floats = peer("skl2onnx.common.data_types").FloatTensorType
            model = skl2onnx.convert_sklearn(self.transformer, initial_types=[("x", floats([None, 30]))])
            made = session(model.SerializeToString())
            runs["ONNX Runtime, by skl2onnx"] = partial(made.run, None, {"x": both})
        return runs
