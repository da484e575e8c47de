"""`sequence_batching` in a configuration: what is refused, and how it must fit the model's file."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from services.infer.loading import model_config
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conftest import Repository, output
from tests.infer.onnx_files import accumulating
from tests.infer.sequences.stateful_models import CONTROLS, STATES, config, put, step

CONTROL = 'control_input { name: "c" control { kind: CONTROL_SEQUENCE_START %s } }'
CORRID = 'control_input { name: "c" control { kind: CONTROL_SEQUENCE_CORRID %s } }'
STATE = 'state { input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: 1 %s }'
FIRST = STATE % "initial_state { %s }"

REFUSED = {
    "iterative_sequence: true": "sequence_batching.iterative_sequence (generative sequences",
    "generative_sequence: true": 'has no field named "generative_sequence"',
    "oldest { }": "oldest.max_candidate_sequences 0: expected 1 to",
    "oldest { max_candidate_sequences: 4 preferred_batch_size: 9 }": "preferred_batch_size 9: expected 1 to",
    "direct { minimum_slot_utilization: 1.5 }": "minimum_slot_utilization 1.5: expected 0 to 1",
    'control_input { name: "c" }': "control_input 'c': expected one control, got 0",
    CONTROL % "": "expected one of int32_false_true, fp32_false_true, bool_false_true, got none",
    CONTROL % "fp32_false_true: [0]": "fp32_false_true: expected two values, got 1",
    CONTROL % "fp32_false_true: [0, 1] int32_false_true: [0, 1]": "got int32_false_true and fp32_false_true",
    CONTROL % "fp32_false_true: [0, 1] data_type: TYPE_FP32": "data_type is for CONTROL_SEQUENCE_CORRID only",
    (CONTROL % "fp32_false_true: [0, 1]") * 2: "specifies CONTROL_SEQUENCE_START more than once",
    (CONTROL % "fp32_false_true: [0, 1]").replace('"c"', '"x"'): "'x' is the name of more than one input",
    (CONTROL % "fp32_false_true: [0, 1]").replace('"c"', '""'): "every control_input and state has a name",
    CORRID % "data_type: TYPE_FP32": "data_type TYPE_FP32: expected one of TYPE_UINT64, TYPE_INT64",
    CORRID % "": "CONTROL_SEQUENCE_CORRID: data_type",
    CORRID % "data_type: TYPE_INT64 fp32_false_true: [0, 1]": "has a data_type, and no fp32_false_true",
    STATE % "use_growable_memory: true": "state 'i': use_growable_memory is not supported",
    (STATE % "").replace("data_type: TYPE_FP32", ""): "state 'i': data_type is missing",
    (STATE % "").replace("dims: 1", "dims: 0"): "state 'i': dims [0]: expected 1 or more",
    STATE % "" + (STATE % "").replace('"i"', '"j"'): "'o' is the output_name of more than one state",
    FIRST % "data_type: TYPE_INT32 dims: 1 zero_data: true": "data_type TYPE_INT32: the state is TYPE_FP32",
    FIRST % "data_type: TYPE_FP32 dims: 2 zero_data: true": "dims [2]: expected dims of the state, [1]",
    FIRST % "data_type: TYPE_FP32 dims: 1": "expected zero_data or data_file",
    FIRST % 'data_type: TYPE_FP32 dims: 1 data_file: "../x"': "data_file '../x': expected a name without folders",
    FIRST % "data_type: TYPE_FP32 dims: 1 zero_data: true }  initial_state { ": "expected one initial_state, got 2",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_by_name(text):
    whole = f'max_batch_size: 4 input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} sequence_batching {{ {text} }}'
    with pytest.raises(FailedPrecondition) as err:
        model_config.check(model_config.parse(whole), OnnxRuntime())
    assert REFUSED[text] in err.value.message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("model_transaction_policy { decoupled: true }", "sequence_batching of a decoupled model is not supported"),
        (
            'parameters { key: "isolation" value { string_value: "shared" } }',
            "sequence_batching with parameter isolation 'shared' is not supported",
        ),
        ('parameters { key: "slo_ms" value { string_value: "5" } }', "parameter slo_ms does nothing beside"),
    ],
)
def test_settings_that_exclude_sequences_are_rejected(more, said):
    with pytest.raises(FailedPrecondition, match=said):
        model_config.check(model_config.parse(f"sequence_batching {{ }} {more}"), OnnxRuntime())


MISFITS = {
    "a control that is not there": (
        CONTROLS.replace('"END"', '"END2"'),
        STATES,
        "the model has no control_input 'END2': it has 'x', 'total_in'",
    ),
    "a control of another datatype": (
        CONTROLS.replace("fp32_false_true: [0, 1]", "int32_false_true: [0, 1]", 1),
        STATES,
        "control_input 'START' is INT32 in the configuration, FP32 in the model",
    ),
    "a control that is left out": (
        CONTROLS.replace(
            'control_input { name: "END" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [0, 1] } }', ""
        ),
        STATES,
        "",
    ),
    "a state that is not there": (CONTROLS, STATES.replace('"total_out"', '"nope"'), "no state output_name 'nope'"),
    "a state of other dims": (
        CONTROLS,
        STATES.replace("TYPE_FP32 dims: 1 }", "TYPE_FP32 dims: 2 }", 1),
        "state input_name 'total_in': the configuration says [2] with a batch dimension, the model [-1,1]",
    ),
    "a first state that is not there": (CONTROLS, STATES.replace('"one"', '"two"'), "cannot read two"),
}


@pytest.mark.parametrize("what", [what for what, (_, _, said) in MISFITS.items() if said])
async def test_settings_that_do_not_match_the_model_are_rejected(serve, models_folder: Repository, what):
    controls, states, said = MISFITS[what]
    put(models_folder, "m", config("", controls=controls).replace(STATES, states))
    served = await serve(models_folder.root)
    (row,) = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert row.state == "UNAVAILABLE"
    assert said in row.reason


async def test_a_first_state_of_another_size(serve, models_folder: Repository):
    put(models_folder, "m", config(""))
    (models_folder.root / "m/initial_state/one").write_bytes(b"abc")
    served = await serve(models_folder.root)
    (row,) = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert "initial_state/one: byte size mismatch" in row.reason


async def test_a_control_that_is_left_out_is_an_input(serve, models_folder: Repository):
    controls, _, _ = MISFITS["a control that is left out"]
    put(models_folder, "m", config("", controls=controls))
    served = await serve(models_folder.root)
    metadata = await served.stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))
    assert [tensor.name for tensor in metadata.inputs] == ["x", "END"]


@pytest.mark.parametrize(
    ("control", "values", "yes"),
    [(TensorProto.INT32, "int32_false_true: [3, 5]", 5), (TensorProto.BOOL, "bool_false_true: [false, true]", 1)],
)
async def test_controls_of_each_datatype(serve, models_folder: Repository, control, values, yes):
    controls = CONTROLS.replace("fp32_false_true: [0, 1]", values).replace("TYPE_INT64", "TYPE_INT32")
    made = models_folder.put("m", accumulating(control, TensorProto.INT32), config=config("", controls=controls))
    (made / "initial_state").mkdir()
    (made / "initial_state/one").write_bytes(np.float32(1).tobytes())
    served = await serve(models_folder.root)
    response = await served.stub.ModelInfer(step("m", -7, start=True))
    assert output(response, "told").tolist() == [[yes, 3 if yes == 5 else 0, yes]]
    assert output(response, "id").tolist() == [[-7]]


async def test_a_state_may_be_an_output_too(serve, models_folder: Repository):
    given = 'input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "total_out" data_type: TYPE_FP32 dims: 1 }'
    put(models_folder, "m", config("", more=given))
    served = await serve(models_folder.root)
    responses = [await served.stub.ModelInfer(step("m", 1, 2, start=n == 0)) for n in range(2)]
    assert [output(response, "total_out").item() for response in responses] == [2, 4]


async def test_warm_up_with_samples(serve, models_folder: Repository):
    sample = """model_warmup { name: "s" batch_size: 2 count: 3
        inputs { key: "x" value { data_type: TYPE_FP32 dims: 1 random_data: true } } }"""
    put(models_folder, "m", config("", more=sample))
    served = await serve(models_folder.root)
    response = await served.stub.ModelInfer(step("m", 1, 2, start=True))
    assert output(response, "total").item() == 2
