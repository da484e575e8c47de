"""tabular in float64: what the other versions must equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.tabular.columns import Columns

Array = npt.NDArray[Any]


def run(columns: Columns, numbers: Array, codes: Array, out: Array, stream: None = None) -> None:
    filled = np.where(np.isnan(numbers), columns.fill, numbers).astype(np.float64)
    known = columns.categories == codes[:, columns.owners]
    with np.errstate(over="ignore"):  # What float32 cannot hold is infinite.
        out[:] = np.concatenate([(filled - columns.mean) * columns.scale.astype(np.float64), known], axis=1)
