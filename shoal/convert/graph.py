"""Changes of an ONNX graph: names and float types of inputs and outputs, batch dimension, order of opsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from shoal.errors import FailedPrecondition


def renamed(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Rename the inputs and outputs of `model`, in their order, in place.

    Raises:
        FailedPrecondition: the model has another number of inputs or outputs.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    present = [value.name for value in model.graph.input if value.name not in initializers]
    for what, have, want in (("inputs", present, inputs), ("outputs", [v.name for v in model.graph.output], outputs)):
        if len(have) != len(want):
            raise FailedPrecondition(f"the exporter made the {what} {', '.join(have)}; expected {', '.join(want)}")
    new_names = dict(zip(present, inputs, strict=True)) | {
        value.name: name for value, name in zip(model.graph.output, outputs, strict=True)
    }
    # First free the new names that inner values of the graph have.
    occupied = {name for name in new_names.values() if name not in new_names}
    _rename(model.graph, {name: f"{name}_inside" for name in occupied})
    _rename(model.graph, new_names)
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


def with_float32_inputs(model: onnx.ModelProto, inputs: Sequence[str]) -> onnx.ModelProto:
    """Turn those of `inputs` that are float64 into float32 inputs with a cast, in place."""
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


def with_float32_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn float64 outputs of `model` into float32 outputs with a cast, in place."""
    for value in model.graph.output:
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            inside = f"{value.name}_float64"
            for node in model.graph.node:
                node.output[:] = [inside if each == value.name else each for each in node.output]
            _rename_uses(model.graph, value.name, inside)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            model.graph.node.append(helper.make_node("Cast", [inside], [value.name], to=TensorProto.FLOAT))
    return model


def with_sorted_opsets(model: onnx.ModelProto) -> onnx.ModelProto:
    """Sort the opset imports of `model`, which some exporters write in random order, in place."""
    versions = {each.domain: each.version for each in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, versions[domain]) for domain in sorted(versions))
    return model


def with_batch_dimension(model: onnx.ModelProto, name: str = "batch") -> onnx.ModelProto:
    """Make the first dimension of every input and output of `model` the batch, in place."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].Clear()
            dims[0].dim_param = name
    return model


def with_inferred_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Correct the declared types of the outputs of `model` to the inferred ones, in place."""
    declared = [value.type.tensor_type.elem_type for value in model.graph.output]
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for value in bare.graph.output:
        value.type.tensor_type.elem_type = TensorProto.UNDEFINED
    inferred = onnx.shape_inference.infer_shapes(bare)
    for value, inferred_value, declared_type in zip(model.graph.output, inferred.graph.output, declared, strict=True):
        value.type.tensor_type.elem_type = inferred_value.type.tensor_type.elem_type or declared_type
    return model
