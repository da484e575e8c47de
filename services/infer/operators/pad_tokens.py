"""Operation `pad_tokens`: token lists of any lengths to a padded batch with an attention mask.

rows of an execution ──little padding──> one batch, as wide as the longest row
                     └──much──> RequestRows: a batch for each request, as wide as its own longest row
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import numpy as np
from pydantic import Field

from kernels.pad_tokens import pad_tokens
from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Rows, Value, rows
from services.infer.requests.tensors import Tensor

V = TypeVar("V")

_OUTPUTS = ("input_ids", "attention_mask", "token_type_ids")

# In tokens of 8 bytes, of one row and of all. Beyond, one caller's long row would take the memory of its length for
# each row of the others, in three outputs, and their models would compute on it.
_MAX_ROW_PADDING = 32_768
_MAX_PADDING = 2 << 20


class PadTokensParameters(Parameters):
    """Parameters of `pad_tokens`."""

    length: int = Field(0, ge=0, le=1 << 20)
    """Fixed length of all rows; 0: determined by `pad_to`."""
    pad_to: Literal["longest", "own"] = "longest"
    """longest: the longest row of the execution. own: each row is only rounded up, so that the next model batches rows
    of similar length and no row is padded to the longest."""
    max_length: int = Field(0, ge=0, le=1 << 20)
    """Longer rows are truncated; 0: no limit but `length`."""
    multiple_of: int = Field(8, ge=1, le=4096)
    """Lengths are rounded up to a multiple: the next model gets fewer shapes, and more requests share a batch."""
    pad_id: int = 0
    side: Literal["right", "left"] = "right"


class PadTokens:
    """INT64 ids of any lengths to ids, mask and types of one length; with `pad_to` own, each row has its own length."""

    is_batched = True
    only_computes = True
    inputs = (
        spec("input_ids", "INT64", -1, ragged=True),
        spec("token_type_ids", "INT64", -1, ragged=True, optional=True),
    )

    def __init__(self, parameters: PadTokensParameters, context: OperationContext) -> None:
        self._parameters, self._device = parameters, context.device
        length = parameters.length or -1
        self._is_ragged = parameters.pad_to == "own" and not parameters.length
        self.outputs = tuple(spec(name, "INT64", length, ragged=self._is_ragged) for name in _OUTPUTS)

    def run(self, inputs: Mapping[str, Value]) -> Results:
        ids_rows = rows(inputs["input_ids"])
        types = rows(inputs["token_type_ids"]) if "token_type_ids" in inputs else []
        unfit = {
            n: f"input 'token_type_ids' has {len(kind)} numbers, input 'input_ids' {len(ids)}: expected as many"
            for n, (ids, kind) in enumerate(zip(ids_rows, types, strict=False))
            if len(kind) != len(ids)
        }
        if not self._is_ragged:
            if self._has_much_padding(ids_rows):
                return Results(self._by_request(ids_rows, types), unfit)
            batch = self._batch(ids_rows, types, self._device.to_value)
            return Results(dict(zip(_OUTPUTS, batch, strict=True)), unfit)
        batches = [self._batch([ids], types[n : n + 1], self._device.to_host) for n, ids in enumerate(ids_rows)]
        return Results({name: [batch[n][0] for batch in batches] for n, name in enumerate(_OUTPUTS)}, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"input_ids": [np.arange(1, 4)], "token_type_ids": [np.zeros(3, np.int64)]}

    def _batch(self, ids_rows: Rows, types: Rows, convert: Callable[[Any], V]) -> tuple[V | Tensor, ...]:
        """Return ids, mask and types of one width; without `types`, zeros. `convert` converts a kernel's result."""
        width = self._width(max(map(len, ids_rows), default=0))
        ids, mask = self._padded(ids_rows, width, self._parameters.pad_id)
        kinds: V | Tensor = np.zeros(ids.shape, np.int64)
        if types:
            kinds = convert(self._padded(types, width, 0)[0])
        return convert(ids), convert(mask), kinds

    def _has_much_padding(self, ids_rows: Rows) -> bool:
        lengths = list(map(len, ids_rows))
        if self._parameters.length or not lengths:
            return False
        width = self._width(max(lengths))
        padding = sum(width - min(length, width) for length in lengths)
        return width - min(lengths) > _MAX_ROW_PADDING or padding > _MAX_PADDING

    def _by_request(self, ids_rows: Rows, types: Rows) -> Mapping[str, Value]:
        lengths = list(map(len, ids_rows))
        contents: tuple[Sequence[Any], ...] = (ids_rows, [1] * len(lengths), types or [0] * len(lengths))
        fills, is_left = (self._parameters.pad_id, 0, 0), self._parameters.side == "left"
        # Code that only counts and cuts the rows treats the object as a tensor.
        return {
            name: cast("Tensor", RequestRows(rows, lengths, self._width, fill, is_left=is_left))
            for name, rows, fill in zip(_OUTPUTS, contents, fills, strict=True)
        }

    def _width(self, longest: int) -> int:
        parameters = self._parameters
        if parameters.length:
            return parameters.length
        width = -(-max(longest, 1) // parameters.multiple_of) * parameters.multiple_of
        return min(width, parameters.max_length) if parameters.max_length else width

    def _padded(self, id_rows: Rows, width: int, pad_id: int) -> tuple[Any, Any]:
        flat = np.concatenate([np.empty(0, np.int64), *id_rows])
        offsets = np.cumsum([0, *map(len, id_rows)], dtype=np.int64)
        to_device, parameters = self._device.to_device, self._parameters
        padded: tuple[Any, Any] = pad_tokens(
            to_device(flat), to_device(offsets), width=width, pad_id=pad_id, side=parameters.side, truncate=True
        )
        return padded


class RequestRows:
    """Rows of several requests that are not padded yet: a slice, the rows of one request, is padded by itself."""

    def __init__(
        self, rows: Sequence[Any], lengths: Sequence[int], width: Callable[[int], int], fill: int, *, is_left: bool
    ) -> None:
        """Store `rows`, each an array or one number for all its tokens; `width` returns the width for a longest row."""
        self._rows, self._lengths, self._width = rows, lengths, width
        self._fill, self._is_left = fill, is_left

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> Tensor:
        """Return the rows padded to the longest of them."""
        rows, lengths = self._rows[part], self._lengths[part]
        width = self._width(max(lengths, default=0))
        padded = np.full((len(rows), width), self._fill, np.int64)
        for into, row, tokens in zip(padded, rows, lengths, strict=True):
            length = min(tokens, width)
            into[width - length if self._is_left else 0 :][:length] = row if np.isscalar(row) else row[:length]
        return padded
