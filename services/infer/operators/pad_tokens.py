"""Token lists of any lengths to a batch that a model takes: padded ids, and a mask that says which are real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from kernels.pad_tokens import pad_tokens
from services.infer.operators.operation import Results, Setting, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Rows, Value, rows
from services.infer.requests.tensors import Tensor

V = TypeVar("V")

_OUTPUTS = ("input_ids", "attention_mask", "token_type_ids")


class PadTokensParameters(Parameters):
    """Of `pad_tokens`."""

    length: int = Field(0, ge=0, le=1 << 20)
    """Of all rows; 0: as `pad_to` says."""
    pad_to: Literal["longest", "own"] = "longest"
    """The longest row of the execution; or own: each row is only rounded up, so that the model behind runs those of
    about one length together, and nobody pays for the longest."""
    max_length: int = Field(0, ge=0, le=1 << 20)
    """What is longer is cut; 0: nothing is, unless `length` says so."""
    multiple_of: int = Field(8, ge=1, le=4096)
    """Lengths are rounded up to this: the model behind sees fewer shapes, and more calls share a batch."""
    pad_id: int = 0
    side: Literal["right", "left"] = "right"


class PadTokens:
    """INT64 ids of any lengths to ids, mask and types of one length; with `pad_to` own, of one length in each row."""

    is_batched = True
    only_computes = True
    inputs = (
        spec("input_ids", "INT64", -1, ragged=True),
        spec("token_type_ids", "INT64", -1, ragged=True, optional=True),
    )

    def __init__(self, parameters: PadTokensParameters, setting: Setting) -> None:
        self._asked, self._place = parameters, setting.place
        length = parameters.length or -1
        self._apart = parameters.pad_to == "own" and not parameters.length
        self.outputs = tuple(spec(name, "INT64", length, ragged=self._apart) for name in _OUTPUTS)

    def run(self, inputs: Mapping[str, Value]) -> Results:
        given = rows(inputs["input_ids"])
        types = rows(inputs["token_type_ids"]) if "token_type_ids" in inputs else []
        unfit = {
            n: f"input 'token_type_ids' has {len(kind)} numbers, input 'input_ids' {len(ids)}: expected as many"
            for n, (ids, kind) in enumerate(zip(given, types, strict=False))
            if len(kind) != len(ids)
        }
        if not self._apart:
            together = self._batch(given, types, self._place.give)
            return Results(dict(zip(_OUTPUTS, together, strict=True)), unfit)
        one_by_one = [self._batch([ids], types[n : n + 1], self._place.get) for n, ids in enumerate(given)]
        return Results({name: [row[n][0] for row in one_by_one] for n, name in enumerate(_OUTPUTS)}, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"input_ids": [np.arange(1, 4)], "token_type_ids": [np.zeros(3, np.int64)]}

    def _batch(self, given: Rows, types: Rows, passed_on: Callable[[Any], V]) -> tuple[V | Tensor, ...]:
        """Ids, mask and types of one width; where there are no `types`, zeros."""
        width = self._width(max(map(len, given), default=0))
        ids, mask = self._padded(given, width, self._asked.pad_id)
        kinds: V | Tensor = np.zeros(ids.shape, np.int64)
        if types:
            kinds = passed_on(self._padded(types, width, 0)[0])
        return passed_on(ids), passed_on(mask), kinds

    def _width(self, longest: int) -> int:
        asked = self._asked
        if asked.length:
            return asked.length
        width = -(-max(longest, 1) // asked.multiple_of) * asked.multiple_of
        return min(width, asked.max_length) if asked.max_length else width

    def _padded(self, given: Rows, width: int, pad_id: int) -> tuple[Any, Any]:
        flat = np.concatenate([np.empty(0, np.int64), *given])
        offsets = np.cumsum([0, *map(len, given)], dtype=np.int64)
        put, asked = self._place.put, self._asked
        made: tuple[Any, Any] = pad_tokens(
            put(flat), put(offsets), width=width, pad_id=pad_id, side=asked.side, truncate=True
        )
        return made
