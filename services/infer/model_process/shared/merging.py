"""Stacking of batches from several infer processes into one batch, and splitting of its result.

Only batches with rows of numbers are stacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from services.infer.model_process.channel import Message
from services.infer.model_process.payload import TensorPart


def rows_of(message: Message) -> int:
    """Return the number of rows of a batch; 0 when the batch has no batch dimension."""
    return sum(message.header.get("rows", ()))


def most_rows(message: Message) -> int:
    """Return the largest number of rows that the batch may be stacked to; 0 when it cannot be stacked."""
    most = message.header.get("most", 0)
    return most if rows_of(message) and all(datatype != "BYTES" for _, datatype, _ in message.tensors) else 0


def can_stack(first: Message, other: Message) -> bool:
    """Return True when `other` can be stacked with `first`, apart from the number of rows."""
    return (
        bool(most_rows(other))
        and first.header["outputs"] == other.header["outputs"]
        and [_kind(*tensor) for tensor in first.tensors] == [_kind(*tensor) for tensor in other.tensors]
    )


def _kind(name: str, datatype: str, array: Any) -> tuple[str, str, tuple[int, ...]]:
    return name, datatype, array.shape[1:]


def stack(messages: Sequence[Message]) -> Message:
    """Return one batch with the rows of all `messages`, in order."""
    first = messages[0]
    header = {**first.header, "rows": [rows for message in messages for rows in message.header["rows"]]}
    columns = zip(*[message.tensors for message in messages], strict=True)
    tensors = [(parts[0][0], parts[0][1], np.concatenate([array for _, _, array in parts])) for parts in columns]
    return Message(header, tensors)


def split_result(
    header: Mapping[str, Any], parts: Sequence[TensorPart], counts: Sequence[int]
) -> list[list[TensorPart]]:
    """Return the parts of the result for each of the stacked batches; batch n has `counts[n]` rows.

    Raises:
        ValueError: the result does not have one row of fixed size for each row of the batches.
    """
    if header.get("responses") is not None:
        raise ValueError("the model returned a result per request")
    columns = [_rows(part, counts) for part in parts]
    return [list(each) for each in zip(*columns, strict=True)] if columns else [[] for _ in counts]


def _rows(part: TensorPart, counts: Sequence[int]) -> Iterable[TensorPart]:
    rows = sum(counts)
    if part.datatype == "BYTES" or part.shape[:1] != (rows,):
        raise ValueError(f"output '{part.name}' does not have {rows} rows of one size")
    data = part.chunks[0] if len(part.chunks) == 1 else b"".join(part.chunks)
    size = part.size_bytes // rows
    ends = list(accumulate(counts))
    return [
        TensorPart(
            part.name, part.datatype, (count, *part.shape[1:]), (data[(end - count) * size : end * size],), count * size
        )
        for count, end in zip(counts, ends, strict=True)
    ]
