"""Signature of a model: the names, datatypes and shapes of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shoal.oip.datatypes import Datatype


@dataclass(frozen=True)
class TensorSpec:
    """One input or output."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    """The whole shape, batch dimension included; -1 where a dimension varies."""
    labels: tuple[str, ...] = ()
    """Names of an output's classes, by index."""
    is_optional: bool = False
    """True for an input that a request may leave out."""
    is_ragged: bool = False
    """True when rows may differ in shape (`ragged`): requests that differ in such an input may share an execution."""


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    """Bound of rows in one execution; 0: the first dimension is no batch dimension."""
    text: bool = field(default=False)
    """True: BYTES elements must be UTF-8, and are `str` in memory."""

    @cached_property
    def inputs_by_name(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def required(self) -> frozenset[str]:
        """Names of the inputs that every request has."""
        return frozenset(spec.name for spec in self.inputs if not spec.is_optional)

    @cached_property
    def ragged(self) -> frozenset[str]:
        """Names of the inputs whose rows may differ in shape."""
        return frozenset(spec.name for spec in self.inputs if spec.is_ragged)

    @cached_property
    def outputs_by_name(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for spec in self.outputs}


def fits(shape: Sequence[int], spec: Sequence[int]) -> bool:
    """Return True when a tensor of `shape` matches `spec`, in which -1 matches any size."""
    return len(shape) == len(spec) and all(want in (-1, got) for got, want in zip(shape, spec, strict=True))
