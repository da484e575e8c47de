"""Parameters of `tabular` for each column, from scikit-learn's fitted attributes or any numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kernels.arrays import frozen


@dataclass(frozen=True)
class Columns:
    """Parameters of all columns, as arrays on the host or on a GPU. Made by `columns`; must not be changed."""

    fill: Any
    """[f] replacement of a missing number; NaN leaves the number missing."""
    mean: Any
    """[f]"""
    scale: Any
    """[f] 1 / standard deviation."""
    categories: Any
    """int64 [k], all known values of all categorical columns, one output column each."""
    starts: Any
    """int64 [c + 1]: categories[starts[c]:starts[c + 1]] are the values of column c."""
    owners: Any
    """int32 [k]: index of the categorical column of each value."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the numbers, and of the arithmetic on them."""
        dtype: np.dtype[Any] = self.mean.dtype
        return dtype

    @property
    def inputs(self) -> tuple[int, int]:
        """Number of numeric and of categorical input columns."""
        return self.mean.size, self.starts.size - 1

    @property
    def width(self) -> int:
        """Number of output columns."""
        return int(self.mean.size + self.categories.size)

    def on_device(self) -> Columns:
        """Return a copy on the current GPU."""
        return self.moved(importlib.import_module("cupy").asarray)

    def moved(self, move: Callable[[Any], Any]) -> Columns:
        """Return a copy whose arrays are the results of `move`."""
        return Columns(**{name: move(array) for name, array in vars(self).items()})


def columns(
    *,
    mean: npt.ArrayLike = (),
    std: npt.ArrayLike | None = None,
    fill: npt.ArrayLike | None = None,
    categories: Sequence[npt.ArrayLike] = (),
    dtype: Literal["float32", "float64"] = "float32",
) -> Columns:
    """Check parameters and return Columns on the host.

    From scikit-learn: `fill=imputer.statistics_, mean=scaler.mean_, std=scaler.scale_, categories=encoder.categories_`.

    Args:
        mean: [f], subtracted from the f numeric columns.
        std: [f], divisor after the subtraction; 1 when None. A std of 0, of a constant column, counts as 1, as in
            scikit-learn.
        fill: [f], replacement of NaN before the subtraction; None leaves NaN.
        categories: the known values of each categorical column, distinct integers. Each value is one output column, in
            this order.
        dtype: dtype of the numeric columns.

    Raises:
        ValueError: lengths that differ, a mean or std that is not finite in the dtype, std below 0, a duplicate value.
        TypeError: categories that are not integers, another dtype.
    """
    if dtype not in ("float32", "float64"):
        raise TypeError(f"columns: dtype must be float32 or float64, not {dtype}")
    means = _vector("mean", mean)
    stds = np.ones_like(means) if std is None else _vector("std", std)
    fills = np.full_like(means, np.nan) if fill is None else _vector("fill", fill)
    for name, values in (("std", stds), ("fill", fills)):
        if values.size != means.size:
            raise ValueError(f"columns: mean has {means.size} columns, {name} has {values.size}")
    if not (np.isfinite(means).all() and np.isfinite(stds).all() and (stds >= 0).all()):
        raise ValueError("columns: mean and std must be finite, and std not negative")
    scales = 1 / np.where(stds == 0, 1, stds)
    if any(
        np.abs(values[np.isfinite(values)]).max(initial=0) > np.finfo(dtype).max for values in (means, scales, fills)
    ):
        raise ValueError(f"columns: mean, 1/std and fill must be within {dtype}")
    known = [_known(number, values) for number, values in enumerate(categories)]
    sizes = [values.size for values in known]
    return Columns(
        fill=frozen(fills.astype(dtype)),
        mean=frozen(means.astype(dtype)),
        scale=frozen(scales.astype(dtype)),
        categories=frozen(np.concatenate([np.empty(0, np.int64), *known])),
        starts=frozen(np.cumsum([0, *sizes], dtype=np.int64)),
        owners=frozen(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)),
    )


def _vector(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1:
        raise ValueError(f"columns: {name} must have shape [f], not {list(vector.shape)}")
    return vector


def _known(number: int, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    known = np.asarray(values)
    whole = known.astype(np.int64) if known.dtype.kind in "iuf" else np.empty(0, np.int64)
    if known.size and not (whole.size and (whole == known).all()):
        raise TypeError(
            f"columns: categories[{number}] has a value that is not a 64-bit integer: map strings to integers first"
        )
    if known.ndim != 1 or np.unique(whole).size != whole.size:
        raise ValueError(f"columns: categories[{number}] must be a list of distinct values")
    return whole
