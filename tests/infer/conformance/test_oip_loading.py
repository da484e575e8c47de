"""RepositoryModelLoad and Unload: on an instance of its own, in explicit mode, with overrides and mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.infer import onnx_files
from tests.infer.conformance import wire
from tests.infer.conformance.instance import Instance
from tests.infer.conformance.wire import floats, request

Stub = GRPCInferenceServiceStub

PAIR = """
platform: "ensemble"
ensemble_scheduling {
  step { model_name: "double" input_map { key: "x" value: "x" } output_map { key: "y" value: "twice" } }
  step { model_name: "triple" input_map { key: "x" value: "twice" } output_map { key: "y" value: "y" } }
}
"""


@pytest.fixture(scope="module")
def changing(front: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    """An instance whose models the tests load and unload."""
    folder = tmp_path_factory.mktemp("loading")
    models = {"double": onnx_files.scale(2).SerializeToString(), "triple": onnx_files.scale(3).SerializeToString()}
    for name, data in {**models, "broken": b"no model"}.items():
        (folder / "models" / name / "1").mkdir(parents=True)
        (folder / "models" / name / "1/model.onnx").write_bytes(data)
    (folder / "models/pair/1").mkdir(parents=True)
    (folder / "models/pair/config.pbtxt").write_text(PAIR)
    settings = {"SHOAL_INFER_MODEL_CONTROL": "explicit", "SHOAL_INFER_LOAD_MODELS": "double"}
    with Instance.serving(folder / "models", folder / "serve.log", settings, front) as running:
        with grpc.insecure_channel(running.address, options=wire.OPTIONS) as channel:
            yield Stub(channel)


@pytest.fixture
def alone(changing: Stub) -> Stub:
    """Serves `double` (y = 2x), as the repository has it; `triple` and `broken` are not loaded."""
    for name in ("pair", "triple", "broken"):
        changing.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name), timeout=wire.PATIENCE_S)
    load(changing, "double")
    return changing


def load(stub: Stub, name: str, **parameters: object) -> None:
    asked = pb.RepositoryModelLoadRequest(model_name=name)
    for key, value in parameters.items():
        setattr(asked.parameters[key], "string_param" if isinstance(value, str) else "int64_param", value)
    stub.RepositoryModelLoad(asked, timeout=wire.PATIENCE_S)


def refused(call, *args: object, **more: object) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **more)
    return wire.status(caught.value)


def infer(stub: Stub, name: str, **more: object) -> list[float]:
    response = stub.ModelInfer(request(name, floats(), **more), timeout=wire.PATIENCE_S)
    row: list[float] = wire.array(response, "y")[0].tolist()
    return row


def states(stub: Stub) -> dict[tuple[str, str], str]:
    return {(row.name, row.version): row.state for row in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models}


def test_only_what_is_loaded_is_served(alone):
    assert infer(alone, "double") == [2, 4, 6, 8]
    assert refused(infer, alone, "triple")[0] in ("NOT_FOUND", "UNAVAILABLE")
    assert alone.ServerReady(pb.ServerReadyRequest()).ready
    load(alone, "triple")
    assert infer(alone, "triple") == [3, 6, 9, 12]
    assert states(alone)[("triple", "1")] == "READY"
    load(alone, "triple")  # Again: a reload.
    assert infer(alone, "triple") == [3, 6, 9, 12]


def test_unloaded_it_is_gone_until_it_is_loaded_again(alone):
    for _ in range(2):  # Unloading what is unloaded is no error.
        alone.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="double"), timeout=wire.PATIENCE_S)
        assert not alone.ModelReady(pb.ModelReadyRequest(name="double")).ready
        assert refused(infer, alone, "double")[0] in ("NOT_FOUND", "UNAVAILABLE")
    load(alone, "double")
    assert infer(alone, "double") == [2, 4, 6, 8]
    alone.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="nope"), timeout=wire.PATIENCE_S)


def test_a_configuration_in_the_place_of_the_repository_s(alone):
    load(alone, "double", config=json.dumps({"backend": "onnxruntime", "max_batch_size": 2}))
    assert alone.ModelConfig(pb.ModelConfigRequest(name="double")).config.max_batch_size == 2
    assert refused(alone.ModelInfer, request("double", floats(rows=3)))[0] == "INVALID_ARGUMENT"
    assert infer(alone, "double") == [2, 4, 6, 8]
    load(alone, "double")
    assert alone.ModelConfig(pb.ModelConfigRequest(name="double")).config.max_batch_size > 2


def test_files_in_the_place_of_the_repository_s(alone):
    config = json.dumps({"backend": "onnxruntime", "max_batch_size": 4})
    asked = pb.RepositoryModelLoadRequest(model_name="double")
    asked.parameters["config"].string_param = config
    asked.parameters["file:5/model.onnx"].bytes_param = onnx_files.scale(7).SerializeToString()
    alone.RepositoryModelLoad(asked, timeout=wire.PATIENCE_S)
    assert infer(alone, "double", version="5") == [7, 14, 21, 28]
    assert infer(alone, "double") == [7, 14, 21, 28]
    assert list(alone.ModelMetadata(pb.ModelMetadataRequest(name="double")).versions) == ["5"]


def test_a_load_that_fails_says_why_and_leaves_what_serves(alone):
    code, message = refused(load, alone, "broken")
    assert code in ("INTERNAL", "INVALID_ARGUMENT")
    assert "broken" in message
    asked = pb.RepositoryModelLoadRequest(model_name="double")
    asked.parameters["config"].string_param = json.dumps({"backend": "onnxruntime"})
    asked.parameters["file:1/model.onnx"].bytes_param = b"no model"
    assert refused(alone.RepositoryModelLoad, asked)[0] in ("INTERNAL", "INVALID_ARGUMENT")
    assert infer(alone, "double") == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("name", "parameters", "code", "says"),
    [
        ("nope", {}, "INTERNAL", "failed to load 'nope'"),
        ("", {}, "INTERNAL", "failed to load ''"),
        ("double", {"config": "{"}, "INTERNAL", "failed to load 'double'"),
        ("double", {"config": '{"nope": 1}'}, "INTERNAL", "failed to load 'double'"),
        ("double", {"config": 1}, "INVALID_ARGUMENT", "invalid value type for load parameter 'config'"),
        ("double", {"mine": "x"}, "INVALID_ARGUMENT", "unrecognized load parameter 'mine'"),
    ],
)
def test_mistakes(alone, name, parameters, code, says):
    got, message = refused(load, alone, name, **parameters)
    assert (got, message.startswith(says)) == (code, True), message
    assert infer(alone, "double") == [2, 4, 6, 8]


@pytest.mark.parametrize("path", ["../escape", "1/../../escape", "/etc/escape", "1", "model.onnx", "1/"])
def test_files_stay_where_they_belong(alone, path):
    asked = pb.RepositoryModelLoadRequest(model_name="double")
    asked.parameters["config"].string_param = json.dumps({"backend": "onnxruntime"})
    asked.parameters[f"file:{path}"].bytes_param = b"x"
    assert refused(alone.RepositoryModelLoad, asked)[0] in ("INTERNAL", "INVALID_ARGUMENT")
    assert infer(alone, "double") == [2, 4, 6, 8]


def test_unload_with_its_parameter(alone):
    asked = pb.RepositoryModelUnloadRequest(model_name="double")
    asked.parameters["unload_dependents"].bool_param = True
    alone.RepositoryModelUnload(asked, timeout=wire.PATIENCE_S)
    assert not alone.ModelReady(pb.ModelReadyRequest(name="double")).ready
    asked.parameters["mine"].bool_param = True
    assert refused(alone.RepositoryModelUnload, asked)[0] == "INVALID_ARGUMENT"


def test_an_ensemble_brings_its_models_and_takes_them_along(alone):
    load(alone, "pair")
    assert [state for (name, _), state in states(alone).items() if name in ("pair", "triple")] == ["READY", "READY"]
    assert infer(alone, "pair") == [6, 12, 18, 24]
    asked = pb.RepositoryModelUnloadRequest(model_name="pair")
    asked.parameters["unload_dependents"].bool_param = True
    alone.RepositoryModelUnload(asked, timeout=wire.PATIENCE_S)
    assert "READY" not in states(alone).values()
