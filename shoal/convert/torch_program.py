"""PyTorch models: a program saved by `torch.export.save` (.pt2), exported by torch.onnx.export.

The export of the program fixed its variable sizes (`dynamic_shapes`). A program without a variable batch serves one
batch size only, and the report says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal.convert import graph, sample
from shoal.convert.extras import TORCH, first_line, needed, versions
from shoal.convert.original import ANY, Array, Plan, Port, Tensors
from shoal.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    import onnx

_DTYPES = {
    torch.float16: "f2",
    torch.float32: "f4",
    torch.float64: "f8",
    torch.int8: "i1",
    torch.int16: "i2",
    torch.int32: "i4",
    torch.int64: "i8",
    torch.uint8: "u1",
    torch.bool: "?",
}
_LONGEST = 16
"""Largest random size of variable dimensions other than the batch, which keeps a check short."""


def load(path: Path) -> Any:
    """Return the ExportedProgram in the file. Opening the file can run code in it.

    Raises:
        InvalidArgument: the file is not a program.
    """
    try:
        with _quiet():
            return torch.export.load(str(path))
    except Exception as err:
        # Any error of PyTorch's readers, or of the code in the file.
        raise InvalidArgument(f"{path}: not a program of torch.export.save: {first_line(err)}") from err


@dataclass(frozen=True)
class _Input:
    """Input of the program."""

    port: Port
    sizes: tuple[int | str, ...]
    """Sizes; a variable size by its symbol, which inputs of equal size share."""
    low: float
    high: float
    """Range of the example input for integer inputs; unused for others."""


class TorchProgram:
    """Exported PyTorch program as an Original."""

    framework = "PyTorch"
    plans: Sequence[Plan] = (Plan("as exported"),)

    def __init__(self, program: Any) -> None:
        """Raises InvalidArgument when an input or output is not a tensor that can be served."""
        needed("onnxscript", TORCH, "converting a PyTorch program")
        self._program = program
        self._module = program.module()
        self._bounds = {
            str(symbol): (int(span.lower), _upper(span)) for symbol, span in program.range_constraints.items()
        }
        self._inputs = _inputs(program)
        self.packages: Mapping[str, str] = versions("torch", "onnxscript", "onnx")
        self.inputs: Sequence[Port] = [each.port for each in self._inputs]
        self._outputs = _output_names(program)
        self.is_batched = _is_batched(program, self._inputs)
        self.scores: frozenset[str] = frozenset(_score_outputs(program, self._outputs))
        self.classes: Mapping[str, Sequence[str]] = {}
        low, high = self._rows()
        self.max_rows = high
        self.batches: Sequence[int] = (
            sorted({min(max(rows, low), high) for rows in (1, 2, 7, 22)}) if self.is_batched else (1,) * 4
        )
        self.notes: Sequence[str] = _notes(self._inputs, is_batched=self.is_batched, low=low)

    def _rows(self) -> tuple[int, int]:
        """Return the smallest and the largest number of rows of a call."""
        if not self.is_batched:
            return 1, 1
        low, high = self._bounds.get(str(self._inputs[0].sizes[0]), (1, ANY))
        # torch.export says 2 for every size without a declared minimum; most programs also take 1.
        if low == 2:
            try:
                self.predict(self.draw(1, np.random.default_rng(0)))
                low = 1
            except InvalidArgument:
                pass
        return low, high

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        sizes: dict[str, int] = {}
        if self.is_batched:
            sizes[str(self._inputs[0].sizes[0])] = rows
        return {each.port.name: self._drawn(each, sizes, generator) for each in self._inputs}

    def _drawn(self, each: _Input, sizes: dict[str, int], generator: np.random.Generator) -> Array:
        for size in each.sizes:
            if isinstance(size, str) and size not in sizes:
                low, high = self._bounds.get(size, (2, _LONGEST))
                sizes[size] = int(generator.integers(low, max(low, min(high, _LONGEST)) + 1))
        shape = [sizes[size] if isinstance(size, str) else size for size in each.sizes]
        if each.port.dtype.kind == "f":
            return generator.standard_normal(shape).astype(each.port.dtype)
        if each.port.dtype.kind == "b":
            return generator.integers(0, 2, shape).astype(bool)
        return generator.integers(int(each.low), int(each.high) + 1, shape).astype(each.port.dtype)

    def predict(self, inputs: Mapping[str, Array]) -> Tensors:
        for each in self._inputs:
            if not sample.fits(np.shape(inputs[each.port.name]), each.port):
                actual = list(np.shape(inputs[each.port.name]))
                raise InvalidArgument(f"{each.port.name} is {actual}, the program takes {sample.written(each.port)}")
        values = [
            torch.from_numpy(np.ascontiguousarray(inputs[each.port.name], dtype=each.port.dtype))
            for each in self._inputs
        ]
        try:
            args, kwargs = torch.utils._pytree.tree_unflatten(values, self._program.call_spec.in_spec)
            with torch.no_grad():
                found = self._module(*args, **kwargs)
        except Exception as err:
            raise InvalidArgument(f"the program rejects the inputs: {first_line(err)}") from err
        leaves = torch.utils._pytree.tree_leaves(found)
        return {name: leaf.detach().numpy() for name, leaf in zip(self._outputs, leaves, strict=True)}

    def export(self, plan: Plan) -> onnx.ModelProto:
        try:
            with _quiet():
                made = torch.onnx.export(self._program, dynamo=True, verbose=False)
        except Exception as err:
            raise FailedPrecondition(f"torch.onnx.export cannot convert it: {first_line(err)}") from err
        # torch.onnx.export returns None only without dynamo.
        assert made is not None
        model = graph.renamed(made.model_proto, [each.port.name for each in self._inputs], self._outputs)
        return graph.with_batch_dimension(model) if self.is_batched else model


def _inputs(program: Any) -> list[_Input]:
    names = list(program.graph_signature.user_inputs)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    examples = (
        torch.utils._pytree.tree_leaves(program.example_inputs) if program.example_inputs else [None] * len(names)
    )
    found = []
    for name, example in zip(names, examples, strict=True):
        value = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        if not isinstance(value, torch.Tensor):
            raise InvalidArgument(f"input {name!r} of the program is not a tensor: only tensors can be served")
        if value.dtype not in _DTYPES:
            raise InvalidArgument(f"input {name!r} of the program is {value.dtype}, which no model input can have")
        sizes = tuple(int(size) if isinstance(size, int) else str(size) for size in value.shape)
        shape = tuple(size if isinstance(size, int) else None for size in sizes)
        low, high = _range(example)
        found.append(_Input(Port(name, np.dtype(_DTYPES[value.dtype]), shape), sizes, low, high))
    if not found:
        raise InvalidArgument("the program has no inputs")
    return found


def _range(example: Any) -> tuple[float, float]:
    # Integers are mostly indices, and only the example shows their range.
    if not isinstance(example, torch.Tensor) or not example.numel() or example.is_floating_point():
        return 0, 1
    return float(example.min()), float(example.max())


def _upper(span: Any) -> int:
    try:
        return int(span.upper)
    except (TypeError, ValueError, OverflowError, AttributeError):
        # No upper bound.
        return ANY


def _output_values(program: Any) -> list[Any]:
    by_name = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [by_name.get(name) for name in program.graph_signature.user_outputs]


def _output_names(program: Any) -> list[str]:
    """Return the keys of a program that returns a dict of tensors; else `output`, or `output_0`, `output_1` ..."""
    for value in _output_values(program):
        if not isinstance(value, torch.Tensor):
            raise InvalidArgument("the program returns something that is not a tensor: only tensors can be served")
    spec = program.call_spec.out_spec
    count = len(program.graph_signature.user_outputs)
    if spec.type is dict and len(spec.context) == count:
        return [str(key) for key in spec.context]
    return ["output"] if count == 1 else [f"output_{n}" for n in range(count)]


def _is_batched(program: Any, inputs: Sequence[_Input]) -> bool:
    first = {each.sizes[0] if each.sizes else 1 for each in inputs}
    out = {str(value.shape[0]) if value.ndim else "" for value in _output_values(program)}
    (symbol,) = first if len(first) == 1 else (1,)
    return isinstance(symbol, str) and out == {symbol}


def _score_outputs(program: Any, names: Sequence[str]) -> Iterator[str]:
    """Yield the outputs that may be scores of classes."""
    for name, value in zip(names, _output_values(program), strict=True):
        if value.ndim == 2 and isinstance(value.shape[1], int) and value.shape[1] > 1 and value.is_floating_point():
            yield name


def _notes(inputs: Sequence[_Input], *, is_batched: bool, low: int) -> Sequence[str]:
    notes = []
    if not is_batched:
        shapes = "; ".join(f"{each.port.name} {list(each.sizes)}" for each in inputs)
        notes.append(f"the batch size is fixed ({shapes}): export with dynamic_shapes to enable batching")
    elif low > 1:
        notes.append(f"the program takes at least {low} rows: smaller calls were not checked")
    if any(each.port.dtype.kind in "iu" for each in inputs):
        notes.append("random integers are drawn from the range of the program's example input")
    return notes


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of the exporter for its developers."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
