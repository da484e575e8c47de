"""Classification extension: the k best values of an output as text, "value:index" or "value:index:label".

Values are formatted as the protocol's clients expect: integers unchanged, floats with six decimals. Order and ties are
those of `kernels.top_k`.
"""

from __future__ import annotations

import numpy as np

from kernels.top_k import top_k
from services.infer.error_text import quoted
from services.infer.requests.signature import TensorSpec
from services.infer.requests.tensors import Tensor
from shoal.errors import InvalidArgument
from shoal.oip import bfloat16

MAX_CLASSES = 100_000
"""Classes of one output in all rows. Their texts take some 0.3 s of the interpreter for each million."""


def classify(output: Tensor, spec: TensorSpec, classes: int, *, batched: bool) -> Tensor:
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
    values, indices = top_k(flat, classes)
    texts = np.empty(values.shape, object)
    for at, value in np.ndenumerate(values):
        texts[at] = _written(value, int(indices[at]), spec.labels)
    return texts if batched else texts[0]


def _written(value: np.generic, index: int, labels: tuple[str, ...]) -> str:
    number = f"{float(value):f}" if value.dtype.kind == "f" else str(int(value))
    label = labels[index] if index < len(labels) else ""
    return f"{number}:{index}:{label}" if label else f"{number}:{index}"
