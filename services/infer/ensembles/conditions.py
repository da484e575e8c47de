"""Conditions of steps: comparisons of tensors with constants, from the parameter `when.<step>`.

has_text > 0            every element of the tensor
count(boxes) >= 1       the number of rows
language == 'de'        BYTES; == and != only
is_colour == true and size < 640
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.infer.requests.ragged import Value
from services.infer.requests.tensors import Tensor
from shoal.oip import bfloat16
from shoal.oip.datatypes import Datatype

_COMPARISON = re.compile(
    r"\s*(?:count\(\s*(?P<counted>[^\s<>=!()']+)\s*\)|(?P<name>[^\s<>=!()']+))\s*(?P<sign>==|!=|<=|>=|<|>)\s*"
    r"(?:'(?P<text>[^']*)'|(?P<truth>true|false)(?![^\s])|(?P<number>-?\d{1,18}(?:\.\d{1,18})?(?:e-?\d{1,3})?)(?![^\s]))\s*"
)
_AND = re.compile(r"and(?=\s)")

_SIGNS: Mapping[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Undecided(ValueError):
    """A comparison holds for some elements and not for others."""


@dataclass(frozen=True)
class Comparison:
    """One comparison of a tensor with a constant."""

    tensor: str
    is_count: bool
    """The number of rows is compared, not the elements."""
    sign: str
    constant: int | float | bool | str

    def holds(self, value: Value, datatype: Datatype) -> bool:
        """Return True when the comparison holds for all elements; False for a tensor without elements.

        Raises:
            Undecided: the comparison holds for some elements and not for others.
        """
        compare = _SIGNS[self.sign]
        if self.is_count:
            return bool(compare(len(value), self.constant))
        verdicts = set()
        for tensor in value if isinstance(value, list) else (value,):
            verdicts.update(self._verdicts(tensor, datatype, compare))
        if len(verdicts) > 1:
            raise Undecided(f"{self} holds for some elements of '{self.tensor}' and not for others")
        return verdicts == {True}

    def _verdicts(self, tensor: Tensor, datatype: Datatype, compare: Callable[[Any, Any], Any]) -> set[bool]:
        if datatype.is_bytes:
            texts = (e if isinstance(e, str) else bytes(e).decode("utf-8", "replace") for e in tensor.reshape(-1))
            return {bool(compare(text, self.constant)) for text in texts}
        numbers = bfloat16.to_float32(tensor) if datatype.name == "BF16" else tensor
        return {bool(verdict) for verdict in np.unique(compare(numbers, self.constant))}

    def misfit(self, datatype: Datatype) -> str:
        """Return the reason why a tensor of this datatype cannot be compared; empty when it can."""
        is_text = isinstance(self.constant, str)
        if self.is_count:
            return "a count is a number" if is_text or isinstance(self.constant, bool) else ""
        if is_text != datatype.is_bytes:
            return f"'{self.tensor}' is {datatype.name}, which is not compared with {self._constant_text()}"
        return "texts are compared with == and != only" if is_text and self.sign not in ("==", "!=") else ""

    def _constant_text(self) -> str:
        if isinstance(self.constant, bool):
            return "true" if self.constant else "false"
        return f"'{self.constant}'" if isinstance(self.constant, str) else str(self.constant)

    def __str__(self) -> str:
        compared = f"count({self.tensor})" if self.is_count else self.tensor
        return f"{compared} {self.sign} {self._constant_text()}"


Condition = tuple[Comparison, ...]
"""Comparisons that must all hold."""


def parse(text: str) -> Condition:
    """Return the condition that `text` states. Raises ValueError with the expected form."""
    comparisons: list[Comparison] = []
    at = 0
    while True:
        match = _COMPARISON.match(text, at)
        if match is None:
            raise ValueError('expected "tensor > 0", "count(tensor) == 1" or "tensor == \'text\'", joined by and')
        comparisons.append(_comparison(match))
        at = match.end()
        if at == len(text):
            return tuple(comparisons)
        joined = _AND.match(text, at)
        if joined is None:
            raise ValueError(f"expected 'and' or the end after '{text[:at].strip()}'")
        at = joined.end()


def _comparison(match: re.Match[str]) -> Comparison:
    constant: int | float | bool | str
    if match["text"] is not None:
        constant = match["text"]
    elif match["truth"] is not None:
        constant = match["truth"] == "true"
    else:
        constant = float(match["number"]) if re.search(r"[.e]", match["number"]) else int(match["number"])
    return Comparison(match["counted"] or match["name"], match["counted"] is not None, match["sign"], constant)
