"""Batches that several infer processes have waiting, as one; and its answer, parted again.

Only rows of numbers: what else there is runs as it came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from services.infer.model_process.channel import Message
from services.infer.model_process.payload import TensorPart


def rows_of(message: Message) -> int:
    """Of all requests of a batch; 0 when it has no batch dimension."""
    return sum(message.header.get("rows", ()))


def most_rows(message: Message) -> int:
    """How many rows may run together with it; 0 when none."""
    most = message.header.get("most", 0)
    return most if rows_of(message) and all(datatype != "BYTES" for _, datatype, _ in message.tensors) else 0


def can_stack(first: Message, other: Message) -> bool:
    """Whether both can be one batch, apart from its size."""
    return (
        bool(most_rows(other))
        and first.header["outputs"] == other.header["outputs"]
        and [_kind(*tensor) for tensor in first.tensors] == [_kind(*tensor) for tensor in other.tensors]
    )


def _kind(name: str, datatype: str, array: Any) -> tuple[str, str, tuple[int, ...]]:
    return name, datatype, array.shape[1:]


def stacked(messages: Sequence[Message]) -> Message:
    """One batch of all of them."""
    first = messages[0]
    header = {**first.header, "rows": [rows for message in messages for rows in message.header["rows"]]}
    columns = zip(*[message.tensors for message in messages], strict=True)
    tensors = [(parts[0][0], parts[0][1], np.concatenate([array for _, _, array in parts])) for parts in columns]
    return Message(header, tensors)


def parted(header: Mapping[str, Any], parts: Sequence[TensorPart], counts: Sequence[int]) -> list[list[TensorPart]]:
    """The answer's rows for each of the batches, which have `counts` of them.

    Raises:
        ValueError: it has not one row for each of theirs, or what a row is cannot be told.
    """
    if header.get("responses") is not None:
        raise ValueError("there is an answer for each request")
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
