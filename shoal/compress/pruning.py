"""Pruning: removal of nodes with unused results, of unused initializers, and of duplicate weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from shoal.convert.original import Tensors


def prune(source: Path, target: Path, calls: Sequence[Tensors] = ()) -> list[str]:
    """Write the pruned model to `target`, with bit-identical outputs, and return a note about the removed parts."""
    model = onnx.load(source)
    copies = _merge_copies(model.graph)
    nodes = _drop_nodes(model.graph)
    unused = _drop_initializers(model.graph)
    onnx.save_model(model, target)
    return [f"removed: {nodes} unused nodes, {unused} unused initializers, {copies} copies of other initializers"]


def _merge_copies(graph: onnx.GraphProto) -> int:
    """Replace equal initializers by the first of them, and return the number of removed copies."""
    first: dict[bytes, str] = {}
    instead: dict[str, str] = {}
    # A caller may override an initializer that is also an input.
    open_names = {value.name for value in (*graph.input, *graph.output)}
    for tensor in graph.initializer:
        if tensor.name in open_names:
            continue
        nameless = onnx.TensorProto()
        nameless.CopyFrom(tensor)
        nameless.name = ""
        same = first.setdefault(nameless.SerializeToString(deterministic=True), tensor.name)
        if same != tensor.name:
            instead[tensor.name] = same
    for inner in _graphs(graph):
        own = {tensor.name for tensor in inner.initializer} if inner is not graph else set()
        for node in inner.node:
            node.input[:] = [name if name in own else instead.get(name, name) for name in node.input]
    kept = [tensor for tensor in graph.initializer if tensor.name not in instead]
    _replace(graph.initializer, kept)
    return len(instead)


def _drop_nodes(graph: onnx.GraphProto) -> int:
    dropped = 0
    while True:
        used = _used_names(graph)
        kept = [node for node in graph.node if any(name in used for name in node.output if name)]
        if len(kept) == len(graph.node):
            return dropped
        dropped += len(graph.node) - len(kept)
        _replace(graph.node, kept)


def _drop_initializers(graph: onnx.GraphProto) -> int:
    used = _used_names(graph) | {value.name for value in graph.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    dropped = len(graph.initializer) - len(kept)
    _replace(graph.initializer, kept)
    return dropped


def _used_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a node at any depth reads, and the names of outputs."""
    names = {value.name for value in graph.output}
    for inner in _graphs(graph):
        names.update(value.name for value in inner.output)
        for node in inner.node:
            names.update(node.input)
    return names


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _replace(field: object, kept: Sequence[object]) -> None:
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]
