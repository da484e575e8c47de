"""Reference version of tabular, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.tabular.columns import Columns

Array = npt.NDArray[Any]


def run(columns: Columns, numbers: Array, codes: Array, out: Array, stream: None = None) -> None:
    filled = np.where(np.isnan(numbers), columns.fill, numbers).astype(np.float64)
    known = columns.categories == codes[:, columns.owners]
    # Values beyond float32 become infinite.
    with np.errstate(over="ignore"):
        out[:] = np.concatenate([(filled - columns.mean) * columns.scale.astype(np.float64), known], axis=1)
