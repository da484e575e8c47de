"""Small changes to an ONNX graph: names that a client would choose, inputs and outputs of another float type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from shoal.errors import FailedPrecondition


def named(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Renames the model's inputs and outputs, in their order; `model` itself is changed.

    Raises:
        FailedPrecondition: it has another number of them.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    given = [value.name for value in model.graph.input if value.name not in initializers]
    for what, have, want in (("inputs", given, inputs), ("outputs", [v.name for v in model.graph.output], outputs)):
        if len(have) != len(want):
            raise FailedPrecondition(f"the exporter made {what} {', '.join(have)} where {', '.join(want)} are expected")
    wanted = dict(zip(given, inputs, strict=True)) | {
        value.name: name for value, name in zip(model.graph.output, outputs, strict=True)
    }
    # A name inside that somebody now wants outside makes way first.
    taken = {name for name in wanted.values() if name not in wanted}
    _rename(model.graph, {name: f"{name}_inside" for name in taken})
    _rename(model.graph, wanted)
    return model


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)
            for inner in attribute.graphs:
                _rename(inner, names)


def widened(model: onnx.ModelProto, inputs: Sequence[str]) -> onnx.ModelProto:
    """Takes float32 for those `inputs` that the graph computes with as float64; `model` itself is changed."""
    casts = []
    for value in model.graph.input:
        if value.name in inputs and value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            inside = f"{value.name}_float64"
            _rename_uses(model.graph, value.name, inside)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            casts.append(helper.make_node("Cast", [value.name], [inside], to=TensorProto.DOUBLE))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _rename_uses(graph: onnx.GraphProto, name: str, other: str) -> None:
    for node in graph.node:
        node.input[:] = [other if each == name else each for each in node.input]


def narrowed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gives float64 outputs as float32; `model` itself is changed."""
    for value in model.graph.output:
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            inside = f"{value.name}_float64"
            for node in model.graph.node:
                node.output[:] = [inside if each == value.name else each for each in node.output]
            _rename_uses(model.graph, value.name, inside)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            model.graph.node.append(helper.make_node("Cast", [inside], [value.name], to=TensorProto.FLOAT))
    return model


def settled(model: onnx.ModelProto) -> onnx.ModelProto:
    """In an order that is always the same, where an exporter's own is that of a set; `model` itself is changed."""
    versions = {each.domain: each.version for each in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, versions[domain]) for domain in sorted(versions))
    return model


def batched(model: onnx.ModelProto, name: str = "batch") -> onnx.ModelProto:
    """Says of the first dimension of every input and output that it is the batch; `model` itself is changed."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].Clear()
            dims[0].dim_param = name
    return model


def true_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Declares of each output the type that its node gives, where an exporter declared another; `model` is changed."""
    declared = [value.type.tensor_type.elem_type for value in model.graph.output]
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for value in bare.graph.output:
        value.type.tensor_type.elem_type = TensorProto.UNDEFINED
    inferred = onnx.shape_inference.infer_shapes(bare)
    for value, seen, was in zip(model.graph.output, inferred.graph.output, declared, strict=True):
        value.type.tensor_type.elem_type = seen.type.tensor_type.elem_type or was
    return model
