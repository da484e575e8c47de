"""What the runs before READY find out, with real models in a repository."""

from __future__ import annotations

import grpc
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from bench.siege.models import wide
from services.infer.loading import loading, warmup
from services.infer.models.version import State
from services.infer.runtimes import onnx_graph
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request


async def max_batch_size(served, name: str) -> int:
    return (await served.stub.ModelConfig(pb.ModelConfigRequest(name=name))).config.max_batch_size


def reason(served, name: str) -> str:
    (row,) = [row for row in served.models.index() if row.name == name]
    assert row.state is State.UNAVAILABLE
    return row.reason


async def test_a_free_first_dimension_is_a_batch_only_when_rows_are_independent(serve, models_folder: Repository):
    models_folder.bare("double", onnx_files.scale())
    models_folder.bare("lookup", onnx_files.lookup())
    models_folder.bare("mixing", onnx_files.mixing())
    models_folder.bare("fixed", onnx_files.scale(dims=(1, 4)))
    models_folder.bare("text", onnx_files.identity(TensorProto.STRING))
    served = await serve(models_folder.root)
    assert [await max_batch_size(served, name) for name in ("double", "lookup", "mixing", "fixed", "text")] == [
        *(64, 64, 0, 0, 64)
    ]
    # Served as it is, with its own first dimension.
    x = floats([1, 2, 3, 4], [3, 4, 5, 6])
    np.testing.assert_array_equal(output(await served.stub.ModelInfer(request("mixing", x=x)), "y"), x - x.mean(0))


async def test_rows_that_share_a_scale_are_not_batched_unasked(serve, models_folder: Repository, caplog):
    models_folder.bare("trial", onnx_files.loudness())
    models_folder.bare("graph", onnx_files.dynamically_quantized())
    models_folder.put("stated", onnx_files.dynamically_quantized(), config="max_batch_size: 8")
    models_folder.put("stated_trial", onnx_files.loudness(), config="max_batch_size: 8")
    models_folder.put("independent", onnx_files.scale(), config="max_batch_size: 8")
    models_folder.put("off", onnx_files.dynamically_quantized(), config="max_batch_size: 0")
    with caplog.at_level("INFO"):
        served = await serve(models_folder.root)
    assert [await max_batch_size(served, name) for name in ("trial", "graph", "stated", "off")] == [0, 0, 8, 0]
    warned = [record.args["model"] for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(warned) == ["stated", "stated_trial"]
    assert "model graph: not batched (DynamicQuantizeLinear in the model takes one scale" in caplog.text
    assert "model trial: not batched (output 'y' of a row depends on the rows beside it)" in caplog.text


@pytest.mark.parametrize(
    ("made", "most"),
    [
        (onnx_files.brightness(), 0),
        (onnx_files.brightness(TensorProto.INT32), 0),
        (onnx_files.brightness(TensorProto.UINT8, ("n", 1)), 0),
        (onnx_files.brightness(TensorProto.BOOL, ("n", 1)), 64),
        (onnx_files.identity(TensorProto.UINT8), 64),
        # With few tokens, the trial has the ids 0 and 1.
        *(
            (onnx_files.embedding(tokens, mixes=mixes), 0 if mixes else 64)
            for tokens in (2, 100)
            for mixes in (True, False)
        ),
    ],
)
async def test_rows_of_integers_that_influence_each_other_are_not_batched(serve, models_folder: Repository, made, most):
    models_folder.bare("integers", made)
    served = await serve(models_folder.root)
    assert await max_batch_size(served, "integers") == most


async def test_one_boolean_in_a_row_is_different_in_each(serve, models_folder: Repository):
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[0]),
        helper.make_node("Sub", ["float", "mean"], ["y"]),
    ]
    made = onnx_files.model(nodes, [("x", TensorProto.BOOL, ("n", 1))], [("y", TensorProto.FLOAT, ("n", 1))])
    models_folder.bare("booleans", made)
    assert await max_batch_size(await serve(models_folder.root), "booleans") == 0


async def test_halves_of_different_scale_are_still_batched(serve, models_folder: Repository):
    for name, datatype in [("half", TensorProto.FLOAT16), ("brain", TensorProto.BFLOAT16)]:
        models_folder.bare(name, onnx_files.cast(TensorProto.FLOAT, datatype))
    served = await serve(models_folder.root)
    assert [await max_batch_size(served, name) for name in ("half", "brain")] == [64, 64]


# The second size cuts the operator's name, wherever it lies.
@pytest.mark.parametrize("piece_bytes", [1 << 20, 7])
def test_an_operator_is_told_from_a_name(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(onnx_graph, "_PIECE_BYTES", piece_bytes)
    model = onnx_files.identity()
    model.graph.node[0].name = "DynamicQuantizeLinear"
    model.graph.node[0].input[0] = model.graph.input[0].name = "DynamicQuantizeLinear"
    (tmp_path / "named.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "used.onnx").write_bytes(onnx_files.dynamically_quantized().SerializeToString())
    (tmp_path / "empty.onnx").touch()
    assert onnx_graph.dynamic_quantizer(tmp_path / "named.onnx") == ""
    assert onnx_graph.dynamic_quantizer(tmp_path / "used.onnx") == "DynamicQuantizeLinear"
    assert onnx_graph.dynamic_quantizer(tmp_path / "empty.onnx") == ""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "used.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(tmp_path / "used.onnx", options, providers=["CPUExecutionProvider"])
    assert onnx_graph.dynamic_quantizer(tmp_path / "used.ort") == "DynamicQuantizeLinear"


@pytest.mark.parametrize("piece_bytes", [1 << 20, 7])
def test_an_operator_whose_time_depends_on_values_is_told_from_a_name(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(onnx_graph, "_PIECE_BYTES", piece_bytes)
    model = onnx_files.identity()
    model.graph.node[0].name = "Loop"
    model.graph.node[0].input[0] = model.graph.input[0].name = "Loop"
    (tmp_path / "named.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "used.onnx").write_bytes(onnx_files.counting().SerializeToString())
    (tmp_path / "empty.onnx").touch()
    found = [onnx_graph.operator_by_values(tmp_path / f"{name}.onnx") for name in ("named", "used", "empty")]
    assert found == ["", "Loop", ""]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "used.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(tmp_path / "used.onnx", options, providers=["CPUExecutionProvider"])
    assert onnx_graph.operator_by_values(tmp_path / "used.ort") == "Loop"


async def test_the_configuration_overrides_the_finding(serve, models_folder: Repository):
    models_folder.put("double", onnx_files.scale(), config="max_batch_size: 0")
    models_folder.put("mixing", onnx_files.mixing(), config="max_batch_size: 5")
    served = await serve(models_folder.root)
    assert [await max_batch_size(served, name) for name in ("double", "mixing")] == [0, 5]


async def test_a_model_that_fails_on_zeros_is_served_with_a_warning(serve, models_folder: Repository, caplog):
    models_folder.bare("parsing", onnx_files.parsing())
    models_folder.bare("broken", onnx_files.broken())
    models_folder.bare("double", onnx_files.scale())
    served = await serve(models_folder.root)
    assert {row.name: row.state for row in served.models.index()} == dict.fromkeys(
        ("parsing", "broken", "double"), State.READY
    )
    assert (await served.stub.ServerReady(pb.ServerReadyRequest())).ready
    warned = [record.args["model"] for record in caplog.records if "not warmed up" in record.message]
    assert sorted(warned) == ["broken", "parsing"]
    asked = pb.ModelInferRequest(model_name="parsing")
    asked.inputs.add(name="x", datatype="BYTES", shape=[1, 4]).contents.bytes_contents.extend([b"7", b"-1", b"0", b"2"])
    assert output(await served.stub.ModelInfer(asked), "y").tolist() == [[7, -1, 0, 2]]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.ModelInfer(request("broken", x=floats([1, 2, 3, 4])))
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_outputs_bound_the_batches_of_the_warm_up(serve, models_folder: Repository, caplog, monkeypatch):
    monkeypatch.setattr(warmup, "_BATCHES_S", 600.0)
    # A row is 16 MiB.
    models_folder.bare("wide", wide(4 << 20))
    # Two rows are 72 MiB: they are not tried together.
    models_folder.bare("wider", wide(9 << 20))
    with caplog.at_level("INFO"):
        served = await serve(models_folder.root)
    assert "model wide: batches of 8 rows and more are not warmed up" in caplog.text
    assert [await max_batch_size(served, name) for name in ("wide", "wider")] == [64, 0]


async def test_a_stated_warm_up_that_fails_fails_the_load(serve, models_folder: Repository):
    models_folder.put("parsing", onnx_files.parsing(), config=PARSING % "zero_data: true")
    served = await serve(models_folder.root)
    assert "model_warmup 'sample'" in reason(served, "parsing")
    assert not (await served.stub.ServerReady(pb.ServerReadyRequest())).ready


PARSING = """
model_warmup [{
  name: "sample"
  inputs { key: "x" value { data_type: TYPE_STRING dims: [1, 4] %s } }
}]
"""


SAMPLE = """
max_batch_size: 4
model_warmup [{
  name: "sample" batch_size: 2
  inputs { key: "i" value { data_type: TYPE_INT64 dims: [1] %s } }
}]
"""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("zero_data: true", ""),
        ("random_data: true", ""),
        ('input_data_file: "two"', ""),
        ('input_data_file: "nine"', "model_warmup 'sample': indices element out of data bounds"),
        ('input_data_file: "short"', "byte size mismatch"),
        ('input_data_file: "missing"', "No such file"),
        ("", "input 'i' has no data"),
    ],
)
async def test_samples_of_the_configuration_must_succeed(serve, models_folder: Repository, data, text):
    folder = models_folder.put("lookup", onnx_files.lookup(), config=SAMPLE % data)
    (folder / "warmup").mkdir()
    for name, content in [("two", np.int64(2).tobytes()), ("nine", np.int64(9).tobytes()), ("short", b"\0")]:
        (folder / "warmup" / name).write_bytes(content)
    served = await serve(models_folder.root)
    if text:
        assert text in reason(served, "lookup")
    else:
        assert (await served.stub.ModelReady(pb.ModelReadyRequest(name="lookup"))).ready


async def test_a_sample_has_no_more_bytes_than_a_call_in_all_inputs(serve, models_folder: Repository, monkeypatch):
    monkeypatch.setattr(warmup, "_MAX_CALL_BYTES", 1 << 10)
    config = "max_batch_size: 4 model_warmup [{ name: 'sample' %s }]"
    inputs = "inputs { key: '%s' value { data_type: TYPE_FP32 dims: [%d] random_data: true } }"
    for name, length in (("fits", 128), ("large", 129)):
        sample = " ".join(inputs % (key, length) for key in "ab")
        models_folder.put(name, onnx_files.add(), config=config % sample)
    served = await serve(models_folder.root)
    assert (await served.stub.ModelReady(pb.ModelReadyRequest(name="fits"))).ready
    assert "its inputs have 1032 bytes in 1 rows: more than a call can carry" in reason(served, "large")


async def test_a_model_whose_warm_up_never_ends_is_given_up(serve, models_folder: Repository, monkeypatch):
    monkeypatch.setattr(loading, "LOAD_S", 0.5)
    models_folder.put("endless", onnx_files.endless())
    models_folder.put("double", onnx_files.scale())
    served = await serve(models_folder.root)
    assert reason(served, "endless") == "loading took more than 0.5 s"
    assert (await served.stub.ModelReady(pb.ModelReadyRequest(name="double"))).ready


async def test_types_that_numpy_lacks(serve, models_folder: Repository):
    models_folder.bare("narrow", onnx_files.cast(TensorProto.FLOAT, TensorProto.BFLOAT16))
    models_folder.bare("wide", onnx_files.cast(TensorProto.BFLOAT16, TensorProto.FLOAT))
    served = await serve(models_folder.root)
    assert await max_batch_size(served, "narrow") == 64
    response = await served.stub.ModelInfer(request("narrow", x=floats([1.5, -2, 0, 1])))
    assert response.outputs[0].datatype == "BF16"
    bits = response.raw_output_contents[0]
    assert np.frombuffer(bits, np.uint16).tolist() == [0x3FC0, 0xC000, 0, 0x3F80]
    asked = pb.ModelInferRequest(model_name="wide", raw_input_contents=[bits])
    asked.inputs.add(name="x", datatype="BF16", shape=[1, 4])
    np.testing.assert_array_equal(output(await served.stub.ModelInfer(asked), "y"), floats([1.5, -2, 0, 1]))
    classes = request("narrow", x=floats([1, 3, 2, 0]))
    classes.outputs.add(name="y").parameters["classification"].int64_param = 1
    assert output(await served.stub.ModelInfer(classes), "y").tolist() == [[b"3.000000:1"]]


async def test_what_cannot_be_served_is_unavailable_with_a_reason(serve, models_folder: Repository):
    (models_folder.root / "empty").mkdir(parents=True)
    (models_folder.root / "filed" / "1").mkdir(parents=True)
    (models_folder.root / ".git").mkdir()
    (models_folder.root / "README.md").write_text("no model")
    models_folder.put("pbtxt", onnx_files.scale(), config="max_batch_size: [")
    models_folder.put("latin", onnx_files.scale())
    (models_folder.root / "latin/config.pbtxt").write_bytes(b'name: "\xe9"')
    models_folder.put("labels", onnx_files.scale(), config=LABELS)
    models_folder.put("none", onnx_files.scale(), config="version_policy { specific { versions: [5] } }")
    models_folder.put("odd", onnx_files.cast(TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN).SerializeToString())
    served = await serve(models_folder.root)
    assert "has no version" in reason(served, "empty")
    assert "has no file model.onnx" in reason(served, "filed")
    assert "config.pbtxt: 1:" in reason(served, "pbtxt")
    assert "cannot read config.pbtxt" in reason(served, "latin")
    assert "cannot read labels.txt: No such file" in reason(served, "labels")
    assert "selects none" in reason(served, "none")
    assert reason(served, "odd")
    assert {row.name for row in served.models.index()} == {
        *("empty", "filed", "pbtxt", "latin", "labels", "none", "odd")
    }
    assert served.models.ready_set.value == ()


LABELS = """
max_batch_size: 4
output [{ name: "y" data_type: TYPE_FP32 dims: [4] label_filename: "labels.txt" }]
"""


async def test_an_empty_repository_is_ready(serve, models_folder: Repository):
    served = await serve(models_folder.root)
    assert (await served.stub.ServerReady(pb.ServerReadyRequest())).ready
