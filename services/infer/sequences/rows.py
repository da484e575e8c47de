"""Rows of one execution: for each sequence its step's inputs, its states and its controls.

row 0: step of sequence 7      row 1: empty (READY is false, zeros everywhere)      row 2: step of sequence 9
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from services.infer.requests.tensors import Tensor
from services.infer.sequences.settings import CORRID, END, READY, START, Control, SequenceSettings

SequenceId: TypeAlias = int | str


@dataclass(slots=True)
class Row:
    """One step."""

    inputs: Mapping[str, Tensor]
    """The client's inputs: one row each; whole tensors for a model without a batch dimension."""
    starts: bool
    ends: bool
    id: SequenceId
    states: Mapping[str, Tensor]
    """States by the names of the model's inputs."""
    request_info: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request, for models that use them."""


def columns(
    rows: Sequence[Row | None], settings: SequenceSettings, *, batched: bool, text: bool
) -> dict[str, list[Tensor]]:
    """Return each input of the model, row by row. At least one row holds a step; `text`: BYTES are `str`."""
    like = next(row for row in rows if row is not None)
    sample = {**like.inputs, **like.states}
    empty_rows = {name: _zeros(array, text) for name, array in sample.items()} if None in rows else {}
    found = {name: [empty_rows[name] if row is None else _row_tensor(row, name) for row in rows] for name in sample}
    for control in settings.controls:
        found[control.name] = [_control(control, row, batched=batched, text=text) for row in rows]
    return found


def _row_tensor(row: Row, name: str) -> Tensor:
    return row.inputs[name] if name in row.inputs else row.states[name]


def _zeros(like: Tensor, text: bool) -> Tensor:
    return np.full(like.shape, "" if text else b"", object) if like.dtype == object else np.zeros_like(like)


def _control(control: Control, row: Row | None, *, batched: bool, text: bool) -> Tensor:
    shape = (1,) * (int(batched) + int(not control.is_flat))
    if control.kind == CORRID:
        return _corrid(control, row.id if row is not None else 0, shape, text)
    is_so = row is not None and (
        control.kind == READY or (control.kind == START and row.starts) or (control.kind == END and row.ends)
    )
    return np.full(shape, control.yes if is_so else control.no, control.datatype.dtype)


def _corrid(control: Control, id: SequenceId, shape: tuple[int, ...], text: bool) -> Tensor:
    if control.datatype.is_bytes:
        id_text = str(id or "")
        return np.full(shape, id_text if text else id_text.encode(), object)
    assert isinstance(id, int), "checked on admission"
    # A signed tensor gets the same bits.
    bits = control.datatype.dtype.itemsize * 8
    return np.full(shape, id % (1 << bits), f"<u{bits // 8}").view(control.datatype.dtype)
