"""Drift: the differences between two models' outputs for the same rows.

Relative drift is |got - want| / max(|want|, rms(want)). It does not depend on the scale of an output, and stays small
for elements that are small beside the others of their output. A row flips when its label, or the index of its largest
score, differs. The flip is a tie when the original's two best scores differ by less than the tolerance: rounding
decides the label of such a row. Ties are reported, but do not count against the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from shoal.convert.original import Array

_SMALL = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class OutputDrift:
    """Drift of one output, over all rows."""

    name: str
    max_abs: float
    """Infinite when one output is a number and the other is NaN."""
    mean_abs: float
    max_relative: float
    cosine: float
    """Cosine similarity of all elements as one vector; 1 when both vectors are zero."""
    flips: int | None
    """Number of rows with another label, without ties; None for an output without labels."""
    ties: int = 0
    """Number of rows with another label whose two best scores in the original differ by less than the tolerance."""
    is_number: bool = True
    """False for an output that is a label: only `flips` and `ties` describe its drift."""


@dataclass(frozen=True)
class Drift:
    """Drift of all outputs. `rows` is the number of calls for a model without a batch dimension."""

    rows: int
    outputs: tuple[OutputDrift, ...]

    @property
    def max_abs(self) -> float:
        return max((output.max_abs for output in self.outputs), default=0.0)

    @property
    def mean_abs(self) -> float:
        return max((output.mean_abs for output in self.outputs), default=0.0)

    @property
    def max_relative(self) -> float:
        return max((output.max_relative for output in self.outputs), default=0.0)

    @property
    def cosine(self) -> float:
        return min((output.cosine for output in self.outputs), default=1.0)

    @property
    def flips(self) -> int | None:
        """Flips of the output with the most; None when no output has labels."""
        return max((output.flips for output in self.outputs if output.flips is not None), default=None)

    @property
    def ties(self) -> int:
        return max((output.ties for output in self.outputs), default=0)


class Mismatch(Exception):
    """Outputs cannot be compared: an output, shape or kind differs. The message says which."""


@dataclass(frozen=True)
class OutputPair:
    """Outputs of both models for one call, by output name."""

    want: Mapping[str, Array]
    got: Mapping[str, Array]


def measure(calls: Sequence[OutputPair], *, scores: Set[str] = frozenset(), tolerance: float = 0.0) -> Drift:
    """Compare `got` with `want` over all calls, which have the same outputs.

    Raises:
        Mismatch: an output is missing, or has another shape or kind.
    """
    for call in calls:
        _check(call)
    names = list(calls[0].want) if calls else []
    ties = [_ties(call, scores, tolerance) for call in calls]
    outputs = tuple(
        _of_output(name, [(call.want[name], call.got[name]) for call in calls], ties, name in scores) for name in names
    )
    return Drift(sum(_rows(call) for call in calls), outputs)


def _check(call: OutputPair) -> None:
    if list(call.want) != list(call.got):
        raise Mismatch(f"the outputs are {', '.join(call.got)} instead of {', '.join(call.want)}")
    for name, want in call.want.items():
        got = call.got[name]
        if want.shape != got.shape:
            raise Mismatch(f"output {name!r} is {list(got.shape)} where the original returns {list(want.shape)}")
        if _is_text(want) != _is_text(got):
            raise Mismatch(f"output {name!r} is {got.dtype} where the original returns {want.dtype}")


def _rows(call: OutputPair) -> int:
    first = next(iter(call.want.values()), None)
    return first.shape[0] if first is not None and first.ndim else 1


def _of_output(name: str, pairs: Sequence[tuple[Array, Array]], ties: Sequence[Array], is_scores: bool) -> OutputDrift:
    flips, tied = None, 0
    if is_scores or not _is_float(pairs[0][0]):
        flipped = [_flipped_rows(want, got, is_scores) for want, got in pairs]
        tied = sum(int((rows & tie).sum()) for rows, tie in _aligned(flipped, ties))
        flips = sum(int(rows.sum()) for rows in flipped) - tied
    if not _is_float(pairs[0][0]):
        return OutputDrift(name, 0.0, 0.0, 0.0, 1.0, flips, tied, is_number=False)
    want = np.concatenate([want.reshape(-1) for want, _ in pairs]).astype(np.float64)
    got = np.concatenate([got.reshape(-1) for _, got in pairs]).astype(np.float64)
    difference = _absolute_difference(want, got)
    scale = np.maximum(np.abs(np.where(np.isfinite(want), want, 0)), max(_rms(want), _SMALL))
    return OutputDrift(
        name,
        float(difference.max(initial=0.0)),
        float(difference.mean()) if difference.size else 0.0,
        float((difference / scale).max(initial=0.0)),
        _cosine(want, got),
        flips,
        tied,
    )


def _absolute_difference(want: Array, got: Array) -> Array:
    """Return |got - want|: 0 for equal infinities and for two NaN, infinity if only one value is NaN."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - want)
    same = (want == got) | (np.isnan(want) & np.isnan(got))
    return np.where(same, 0.0, np.where(np.isnan(difference), math.inf, difference))


def _flipped_rows(want: Array, got: Array, is_scores: bool) -> Array:
    """Return True for each row whose label differs."""
    if is_scores:
        # argmax selects a NaN in both arrays. The drift of the output reports such a NaN.
        return np.asarray(want.argmax(axis=1) != got.argmax(axis=1))
    differs = want.astype(str) != got.astype(str) if _is_text(want) else want != got
    rows = want.shape[0] if want.ndim else 1
    return np.asarray(np.asarray(differs).reshape(rows, -1).any(axis=1))


def _ties(call: OutputPair, scores: Set[str], tolerance: float) -> Array:
    """Return True for each row whose two best scores in the original are equal within the tolerance."""
    tied = np.zeros(_rows(call), dtype=np.bool_)
    for name in scores & call.want.keys():
        two = np.sort(call.want[name].astype(np.float64), axis=1)[:, -2:]
        if two.shape[1] == 2:
            tied |= two[:, 1] - two[:, 0] <= 2 * tolerance * np.maximum(np.abs(two).max(axis=1), _rms(call.want[name]))
    return tied


def _aligned(flipped: Iterable[Array], ties: Iterable[Array]) -> Iterable[tuple[Array, Array]]:
    """Return pairs of equal length. An output with another number of rows than the scores has no ties."""
    return ((rows, tie) for rows, tie in zip(flipped, ties, strict=True) if rows.shape == tie.shape)


def _rms(values: Array) -> float:
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def _cosine(want: Array, got: Array) -> float:
    finite = np.isfinite(want) & np.isfinite(got)
    want, got = want[finite], got[finite]
    lengths = float(np.linalg.norm(want) * np.linalg.norm(got))
    if lengths == 0.0:
        return 1.0 if np.array_equal(want, got) else 0.0
    return float(np.clip(want @ got / lengths, -1.0, 1.0))


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f"


def _is_text(array: Array) -> bool:
    return array.dtype.kind in "OSU"
