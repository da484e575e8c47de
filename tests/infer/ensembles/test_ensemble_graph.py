"""Configurations of ensembles: what is read, what is completed from the steps' models, and what is refused by name."""

from __future__ import annotations

import pytest
from onnx import TensorProto

from services.infer.ensembles.graph import graph_of
from services.infer.loading import model_config
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.ensembles.conftest import FAN, parameter, step, tensor, written

DOUBLE = step("double", {"x": "x"}, {"y": "y"})


def read(text: str):
    config = model_config.parse(text)
    config.name = "e"
    model_config.check_ensemble(config)
    return graph_of(config)


def test_what_is_read():
    """model_name, model_version, input_map, output_map."""
    text = written(
        step("second", {"a": "m"}, {"b": "out"}, version=7),
        step("first", {"x": "in"}, {"y": "m"}),
        more="max_batch_size: 4",
    )
    graph = read(text)
    assert [(s.model, s.version) for s in graph.steps] == [("second", "7"), ("first", "")]
    assert (dict(graph.steps[0].inputs), dict(graph.steps[0].outputs)) == ({"a": "m"}, {"b": "out"})
    assert (graph.order, graph.models, graph.inputs, graph.last) == ((1, 0), ("second", "first"), ("in",), ("out",))


WRONG = {
    'platform: "ensemble"': "has 0 steps: expected 1 to 256",
    'platform: "ensemble" ensemble_scheduling { }': "has 0 steps",
    'platform: "tensorrt_plan" ' + DOUBLE.replace("step", "ensemble_scheduling { step", 1) + "}": "expected 'ensemble'",
    written("step { }"): "step 0 has no model_name; step 0 has no input_map; step 0 has no output_map",
    written(step("e", {"x": "x"}, {"y": "y"})): "step 0 is the ensemble itself",
    written(step("m", {"x": "x"}, {"y": "y"}, version=-2)): "model_version -2",
    written(step("m", {"x": ""}, {"y": "y"})): "input_map 'x' to '': expected two names",
    written(DOUBLE, DOUBLE): "tensor 'y' is given by steps 0, 1: only one may",
    written(step("m", {"x": "x"}, {"y": "y", "z": "y"})): "gives tensor 'y' more than once",
    written(step("a", {"x": "p"}, {"y": "q"}), step("b", {"x": "q"}, {"y": "p"})): "some that wait for each other",
    written(
        DOUBLE, more=tensor("input", "z")
    ): "takes tensor 'x', which no step gives and which is no input; input 'z'",
    written(DOUBLE, more=tensor("input", "x") + tensor("input", "y")): "input 'y' is given by step 0 as well",
    written(DOUBLE, more=tensor("output", "z")): "output 'z' is given by no step",
    written(DOUBLE, more=tensor("output", "x")): "output 'x' is given by no step",
    written(DOUBLE, more='backend: "onnxruntime"'): "an ensemble has no backend",
    written(DOUBLE, more="instance_group { count: 2 }"): "an ensemble has no instance_group",
    written(DOUBLE, more="optimization { }"): "an ensemble has no optimization",
    written(DOUBLE, more="model_transaction_policy { decoupled: true }"): "an ensemble has no model_transaction_policy",
    written(DOUBLE, more="max_batch_size: -1"): "max_batch_size -1: expected 0 to",
    written(DOUBLE, more="sequence_batching { }"): "ensemble_scheduling",  # The parser: one of them.
    written(DOUBLE, more=parameter("when.1", "x > 0")): "'1' names no step: expected an index from 0 to 0",
    written(DOUBLE, more=parameter("when.other", "x > 0")): "'other' names no step",
    written(DOUBLE, step("double", {"x": "y"}, {"y": "z"}), more=parameter("each.double", "x")): "names 2 steps",
    written(DOUBLE, more=parameter("when.0", "x > 0") + parameter("when.double", "x > 0")): "this parameter already",
    written(DOUBLE, more=parameter("when.0", "x >")): "parameter 'when.0' 'x >': expected",
    written(DOUBLE, more=parameter("when.0", "x > 0 or x < 2")): "expected 'and' or the end after 'x > 0'",
    written(DOUBLE, more=parameter("when.0", "other > 0")): "looks at tensor 'other', which there is not",
    written(DOUBLE, more=parameter("each.0", "y")): "each.0 'y': expected one of 'x'",
    written(DOUBLE, more=parameter("each.0", "x,,")): "expected the names of tensors",
    written(DOUBLE, more=parameter("skipped.y", "zeros")): "parameter 'skipped.y' 'zeros': expected 'empty'",
    written(DOUBLE, more=parameter("skipped.z", "empty")): "no step gives 'z'",
    written(DOUBLE, more=parameter("max_in_flight", "0")): "expected a whole number from 1 to",
    written(DOUBLE, more=parameter("when.0", "y > 0")): "some that wait for each other",
}


@pytest.mark.parametrize("text", WRONG)
def test_refused_by_name(text):
    with pytest.raises(FailedPrecondition) as err:
        read(text)
    assert WRONG[text] in err.value.message


UNFIT = {
    "unknown": ((step("nope", {"x": "x"}, {"y": "y"}),), "", "step 0, model 'nope' is not ready: Request for unknown"),
    "version": (
        (step("double", {"x": "x"}, {"y": "y"}, version=9),),
        "",
        "step 0, model 'double' is not ready: Request for unknown model: 'double' version 9 is not found",
    ),
    "input": ((step("double", {"z": "x"}, {"y": "y"}),), "", "has no input 'z': its inputs are 'x'"),
    "missing": ((step("add", {"a": "x"}, {"sum": "y"}),), "", "step 0, model 'add' gets no input 'b'"),
    "output": ((step("double", {"x": "x"}, {"z": "y"}),), "", "has no output 'z': its outputs are 'y'"),
    "datatype": (
        (DOUBLE, step("whole", {"x": "y"}, {"y": "z"})),
        "",
        "step 1, model 'whole', input 'x' is INT64, tensor 'y' is FP32 by step 0, model 'double', output 'y'",
    ),
    "shape": ((DOUBLE, step("wide", {"x": "y"}, {"y": "z"})), "", "input 'x' is [-1,5], tensor 'y' is [-1,4]"),
    "declared": ((DOUBLE,), "max_batch_size: 4 " + tensor("input", "x", "5"), "by the ensemble's input 'x'"),
    "kind": ((DOUBLE,), "max_batch_size: 4 " + tensor("input", "x", datatype="INT8"), "is FP32, tensor 'x' is INT8"),
    "promised": ((DOUBLE,), "max_batch_size: 4 " + tensor("output", "y", "3"), "output 'y' is [-1,3], tensor 'y'"),
    "batch": ((DOUBLE,), "max_batch_size: 65", "max_batch_size is 65, but step 0, model 'double' takes 64 rows"),
    "nobatch": (
        (step("fixed", {"x": "x"}, {"y": "y"}),),
        "max_batch_size: 2",
        "max_batch_size is 2, but step 0, model 'fixed' has no batch dimension; set max_batch_size to 0",
    ),
    "text": ((DOUBLE,), parameter("when.0", "x == 'a'"), "'x' is FP32, which is not compared with 'a'"),
    "order": ((step("words", {"x": "x"}, {"y": "y"}),), parameter("when.0", "x > 'a'"), "compared with == and != only"),
    "full": ((DOUBLE,), parameter("skipped.y", "empty"), "output 'y' is [-1,4] and cannot be empty"),
    "shared": (
        (DOUBLE, step("whole", {"x": "i"}, {"y": "y"})),
        parameter("when.0", "x > 0") + parameter("when.1", "x > 0"),
        "step 1, model 'whole', output 'y' is INT64, tensor 'y' is FP32",
    ),
    "two": ((step("add", {"a": "x", "b": "x"}, {"sum": "s"}), step("wide", {"x": "x"}, {"y": "y"}), DOUBLE.replace(
        '"y" }', '"q" }')), "", "tensor 'x' is [-1,5]"),
}  # fmt: skip


async def test_what_does_not_fit_together_is_named_in_the_index(serve, models_folder):
    models_folder.bare("whole", onnx_files.identity(TensorProto.INT64))
    models_folder.bare("wide", onnx_files.scale(dims=("n", 5)))
    models_folder.bare("fixed", onnx_files.scale(dims=(4,)))
    models_folder.bare("words", onnx_files.identity(TensorProto.STRING, ("n", 1)))
    for name, (steps, more, _) in UNFIT.items():
        models_folder.ensemble(f"e-{name}", *steps, more=more)
    for name, text in (("broken", written("step {")), ("none", 'platform: "ensemble"')):
        (models_folder.root / f"e-{name}/1").mkdir(parents=True)
        (models_folder.root / f"e-{name}/config.pbtxt").write_text(text)
    served = await serve(models_folder.root)
    rows = {row.name: row for row in served.models.index()}
    for name, (_, _, expected) in UNFIT.items():
        assert rows[f"e-{name}"].state == "UNAVAILABLE"
        assert expected in rows[f"e-{name}"].reason, name
    assert "config.pbtxt: 1:" in rows["e-broken"].reason
    assert rows["double"].state == "READY"


async def test_an_ensemble_of_itself_is_refused_at_whatever_length(serve, models_folder):
    models_folder.ensemble("a", step("b", {"x": "x"}, {"y": "y"}))
    models_folder.ensemble("b", step("c", {"x": "x"}, {"y": "y"}))
    models_folder.ensemble("c", DOUBLE, step("a", {"x": "y"}, {"y": "z"}))
    served = await serve(models_folder.root)
    reasons = {row.name: row.reason for row in served.models.index()}
    assert any("the ensemble calls itself: " in reasons[name] for name in "abc")
    assert all(row.state == "UNAVAILABLE" for row in served.models.index() if row.name in "abc")
    models_folder.ensemble("c", DOUBLE)
    await served.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="c"))
    assert {row.name for row in served.models.index() if row.state == "READY"} >= {"a", "b", "c"}


async def test_an_ensemble_that_says_nothing_is_completed_from_its_models(serve, models_folder):
    models_folder.ensemble("e", *FAN)
    served = await serve(models_folder.root)
    config = (await served.stub.ModelConfig(pb.ModelConfigRequest(name="e"))).config
    assert (config.platform, config.max_batch_size) == ("ensemble", 64)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("x", 11, [4])]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [("s", 11, [-1]), ("f", 11, [-1])]
    metadata = await served.stub.ModelMetadata(pb.ModelMetadataRequest(name="e"))
    assert (metadata.platform, list(metadata.inputs[0].shape)) == ("ensemble", [-1, 4])


async def test_what_it_says_holds(serve, models_folder):
    more = "max_batch_size: 3 " + tensor("input", "x") + tensor("output", "f", "4") + tensor("output", "t")
    models_folder.ensemble("e", *FAN, more=more)
    served = await serve(models_folder.root)
    config = served.models.find("e", "").loaded.model.config
    assert config.max_batch_size == 3
    assert [(t.name, list(t.dims)) for t in config.output] == [("f", [4]), ("t", [4])]
