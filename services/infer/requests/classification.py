"""Classification extension: the k best values of an output as text, "value:index" or "value:index:label".

Values are formatted as the protocol's clients expect: integers unchanged, floats with six decimals. Order and ties are
those of `kernels.top_k`.
"""

from __future__ import annotations

import numpy as np

from kernels.top_k import top_k
from mesh.rpc.heavy_work import Steps
from services.infer.error_text import quoted
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument
from shoal.oip import bfloat16

# The best of more values are found in a thread: of a million in 10 ms.
_MANY_VALUES = 1 << 16

# Classes of a step: 1 ms.
_STEP_CLASSES = 1_024

MAX_CLASSES = 100_000
"""Classes of one output in all rows. Their texts take some 0.3 s of the interpreter for each million."""


def classify(output: Tensor, spec: TensorSpec, classes: int, *, batched: bool) -> Steps[Tensor]:
    """Return the best classes of `output`, best first.

    Args:
        output: numbers, [rows, ...] when `batched`, else one row of any shape; each row is one list of classes.
        classes: number of classes to return; more than there are means all.

    Returns:
        `str` objects, [rows, k] when `batched`, else [k].

    Raises:
        InvalidArgument: the classes of all rows are more than MAX_CLASSES.
    """
    numbers = bfloat16.to_float32(output) if spec.datatype.name == "BF16" else output
    rows = output.shape[0] if batched else 1
    flat = numbers.reshape(rows, int(np.prod(output.shape[1:])) if batched else output.size)
    count = rows * min(classes, flat.shape[1])
    if count > MAX_CLASSES:
        raise InvalidArgument(
            f"output {quoted(spec.name)}: a classification of {count} classes in {rows} rows: at most {MAX_CLASSES} "
            "in all; ask for fewer, or for the output itself"
        )
    best = []
    if flat.size > _MANY_VALUES:
        yield lambda: best.append(top_k(flat, classes))
    else:
        best.append(top_k(flat, classes))
    ((values, indices),) = best
    is_float = values.dtype.kind == "f"
    texts = np.empty(values.size, object)
    flat_values, flat_indices = values.reshape(-1), indices.reshape(-1)
    for first in range(0, values.size, _STEP_CLASSES):
        yield
        some = slice(first, first + _STEP_CLASSES)
        pairs = zip(flat_values[some].tolist(), flat_indices[some].tolist(), strict=True)
        for n, (value, index) in enumerate(pairs, first):
            texts[n] = _written(f"{value:f}" if is_float else str(int(value)), index, spec.labels)
    shaped: Tensor = texts.reshape(values.shape)
    return shaped if batched else shaped[0]


def _written(number: str, index: int, labels: tuple[str, ...]) -> str:
    label = labels[index] if index < len(labels) else ""
    return f"{number}:{index}:{label}" if label else f"{number}:{index}"
