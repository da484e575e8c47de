"""RepositoryModelLoad and RepositoryModelUnload, over a connection, as Triton's clients use them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import grpc
import onnx
import pytest
from google.protobuf import json_format

from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving, floats, output, request

X = floats([1, 2, 3, 4])
CODE = grpc.StatusCode


def data(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString()


async def load(served: Serving, name: str, /, **parameters: object) -> None:
    """`config` and `file:...` as tritonclient sends them: text, and bytes."""
    asked = pb.RepositoryModelLoadRequest(model_name=name)
    for key, value in parameters.items():
        if isinstance(value, bytes):
            asked.parameters[key].bytes_param = value
        else:
            asked.parameters[key].string_param = value if isinstance(value, str) else json.dumps(value)
    await served.stub.RepositoryModelLoad(asked)


async def unload(served: Serving, name: str, **parameters: bool) -> None:
    asked = pb.RepositoryModelUnloadRequest(model_name=name)
    for key, value in parameters.items():
        asked.parameters[key].bool_param = value
    await served.stub.RepositoryModelUnload(asked)


async def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await call
    return err.value.code(), err.value.details()


async def index(served: Serving) -> dict[tuple[str, str], tuple[str, str]]:
    models = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    return {(m.name, m.version): (m.state, m.reason) for m in models}


async def factor(served: Serving, name: str = "m", version: str = "") -> tuple[str, float]:
    """The version that responds, and what it multiplies by."""
    response = await served.stub.ModelInfer(request(name, version=version, x=X))
    return response.model_version, float(output(response, "y")[0, 0])


async def test_a_folder_that_was_added_and_one_that_was_changed(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    models_folder.put("n", onnx_files.scale(5))
    await load(served, "n")
    assert await factor(served, "n") == ("1", 5.0)
    models_folder.put("m", onnx_files.scale(3))
    assert await factor(served) == ("1", 2.0)
    await load(served, "m")
    assert await factor(served) == ("1", 3.0)
    models_folder.put("m", onnx_files.scale(4), version=2)
    await load(served, "m")
    assert await factor(served) == ("2", 4.0)
    (models_folder.root / "m/config.pbtxt").write_text("version_policy { all {} } max_batch_size: 7")
    await load(served, "m")
    assert await factor(served, version="1") == ("1", 3.0)
    config = await served.stub.ModelConfig(pb.ModelConfigRequest(name="m"))
    assert config.config.max_batch_size == 7
    models_folder.bare("bare", onnx_files.scale(6))
    await load(served, "bare")
    assert await factor(served, "bare") == ("1", 6.0)


async def test_nothing_changed_is_nothing_done(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    version = served.models.find("m", "")
    await load(served, "m")
    assert served.models.find("m", "") is version


async def test_what_had_failed_is_tried_again(serve, models_folder: Repository):
    folder = models_folder.put("m", b"no model")
    served = await serve(models_folder.root)
    code, details = await refused(load(served, "m"))
    assert (code, "load failed for model 'm': version 1 is at UNAVAILABLE state: " in details) == (
        CODE.INVALID_ARGUMENT,
        True,
    )
    (folder / "1/model.onnx").write_bytes(data(onnx_files.scale(2)))
    await load(served, "m")
    assert await factor(served) == ("1", 2.0)


async def test_unknown_models(serve, models_folder: Repository):
    served = await serve(models_folder.root)
    for name in ("nope", "", "../x", "a/b", ".", "..", "a\0b", "x" * 1000, "é" * 200):
        code, details = await refused(load(served, name))
        assert code is CODE.INTERNAL
        assert details.startswith(f"failed to load '{name[:128]}")
        assert "failed to poll from model repository" in details
        await unload(served, name)
    assert await index(served) == {}


async def test_unloaded_until_loaded(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(2))
    models_folder.put("n", onnx_files.scale(3))
    served = await serve(models_folder.root)
    await unload(served, "m", unload_dependents=True)
    assert not (await served.stub.ModelReady(pb.ModelReadyRequest(name="m"))).ready
    assert (await refused(factor(served)))[0] is CODE.NOT_FOUND
    assert await index(served) == {("m", "1"): ("UNAVAILABLE", "unloaded"), ("n", "1"): ("READY", "")}
    assert (await served.stub.ServerReady(pb.ServerReadyRequest())).ready
    assert await factor(served, "n") == ("1", 3.0)
    ready = await served.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
    assert [m.name for m in ready.models] == ["n"]
    await unload(served, "m")
    await load(served, "m")
    assert await factor(served) == ("1", 2.0)


async def test_a_configuration_of_its_own_for_this_load(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(2), config="max_batch_size: 3")
    models_folder.put("m", onnx_files.scale(4), version=2)
    served = await serve(models_folder.root)
    await load(served, "m", config={"max_batch_size": 5, "version_policy": {"all": {}}})
    assert (await served.stub.ModelConfig(pb.ModelConfigRequest(name="m"))).config.max_batch_size == 5
    assert [await factor(served, version=v) for v in ("1", "2")] == [("1", 2.0), ("2", 4.0)]
    await load(served, "m", config={"maxBatchSize": 0, "versionPolicy": {"specific": {"versions": ["1"]}}})
    assert (await served.stub.ModelConfig(pb.ModelConfigRequest(name="m"))).config.max_batch_size == 0
    assert await factor(served) == ("1", 2.0)
    # What ModelConfig says can be given back.
    config = (await served.stub.ModelConfig(pb.ModelConfigRequest(name="m"))).config
    await load(served, "m", config=json_format.MessageToJson(config))
    assert await factor(served) == ("1", 2.0)
    # The next load without one is the repository's again.
    await load(served, "m")
    assert await factor(served) == ("2", 4.0)
    assert (await served.stub.ModelConfig(pb.ModelConfigRequest(name="m"))).config.max_batch_size == 3


async def test_files_of_its_own_are_all_there_is(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    config = {"max_batch_size": 4, "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}]}
    config["output"][0]["label_filename"] = "labels.txt"
    files = {"file:7/model.onnx": data(onnx_files.scale(9)), "file:labels.txt": b"a\nb\nc\nd\n"}
    await load(served, "m", config=config, **files)
    assert await factor(served) == ("7", 9.0)
    await until(lambda: served.models.find("m", "").number == 7)
    classes = request("m", x=X)
    classes.outputs.add(name="y").parameters["classification"].int64_param = 1
    assert output(await served.stub.ModelInfer(classes), "y").tolist() == [[b"36.000000:3:d"]]
    assert (await refused(factor(served, version="1")))[0] is CODE.NOT_FOUND
    # A model that the repository does not have; then other files for it.
    await load(served, "fresh", config={}, **{"file:1/model.onnx": data(onnx_files.scale(3))})
    assert await factor(served, "fresh") == ("1", 3.0)
    await load(served, "fresh", config={}, **{"file:1/model.onnx": data(onnx_files.scale(8))})
    assert await factor(served, "fresh") == ("1", 8.0)
    assert (await refused(load(served, "fresh")))[0] is CODE.INTERNAL
    assert await factor(served, "fresh") == ("1", 8.0)
    await unload(served, "fresh")
    assert (await refused(factor(served, "fresh")))[0] is CODE.NOT_FOUND
    assert (await refused(load(served, "fresh")))[0] is CODE.INTERNAL


async def test_the_folder_of_given_files_goes_with_its_model(serve, models_folder: Repository, kept):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    files = {"file:1/model.onnx": data(onnx_files.scale(9))}
    await load(served, "m", config={}, **files)
    (first,) = kept()
    await load(served, "m", config={"max_batch_size": 3}, **files)
    await until(lambda: len(kept()) == 1 and kept() != [first])
    assert (await refused(load(served, "m", config={}, **{"file:1/model.onnx": b"nothing"})))[0]
    await until(lambda: len(kept()) == 1)
    await unload(served, "m")
    assert kept() == []
    await load(served, "m", config={}, **files)
    await load(served, "m")
    await until(lambda: kept() == [])
    await load(served, "m", config={}, **files)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Folders of given files that are there."""
    root = tmp_path / "temporary"
    root.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(root))
    return lambda: sorted(os.listdir(root))


BAD = {
    "bad json": ({"config": "{"}, CODE.INTERNAL, "no ModelConfig in JSON"),
    "no object": ({"config": "[]"}, CODE.INTERNAL, "expected a JSON object"),
    "deep": ({"config": "[" * 100_000}, CODE.INTERNAL, "config"),
    "unknown field": ({"config": '{"nonsense": 1}'}, CODE.INTERNAL, "nonsense"),
    "huge number": ({"config": '{"max_batch_size": 1e300}'}, CODE.INTERNAL, "config"),
    "bytes": ({"config": b"{}"}, CODE.INVALID_ARGUMENT, "invalid value type for load parameter 'config'"),
    "unknown": ({"foo": "x"}, CODE.INVALID_ARGUMENT, "unrecognized load parameter 'foo'"),
    "alone": ({"file:1/model.onnx": b"x"}, CODE.INTERNAL, "give both"),
    "text": ({"config": "{}", "file:1/model.onnx": "x"}, CODE.INVALID_ARGUMENT, "expected bytes_param"),
    "no version": ({"config": "{}", "file:model.onnx": b"x"}, CODE.INTERNAL, "no version"),
    "both": ({"config": "{}", "file:1": b"x", "file:1/model.onnx": b"y"}, CODE.INTERNAL, "a file and a folder"),
    "broken": ({"config": "{}", "file:1/model.onnx": b"x"}, CODE.INVALID_ARGUMENT, "cannot load model.onnx"),
    "unsupported": ({"config": '{"batch_input": [{}]}'}, CODE.INVALID_ARGUMENT, "batch_input"),
    "no such version": (
        {"config": '{"version_policy": {"specific": {"versions": [9]}}}'},
        CODE.INVALID_ARGUMENT,
        "selects none",
    ),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_override_leaves_what_serves(serve, models_folder: Repository, what, kept):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    parameters, code, text = BAD[what]
    got, details = await refused(load(served, "m", **parameters))
    assert got is code
    assert text in details
    assert len(details) < 2000
    assert await factor(served) == ("1", 2.0)
    assert await index(served) == {("m", "1"): ("READY", "")}
    assert (await served.stub.ServerReady(pb.ServerReadyRequest())).ready
    assert kept() == []


@pytest.mark.parametrize(
    "path",
    ["", "/", "..", "../x", "1/../../x", "/etc/x", "1//x", "1/", "a\\b", "1/a\0b", "1/\n", "1/" + "x" * 300, "a/" * 20],
)
async def test_paths_that_lead_elsewhere(serve, models_folder: Repository, path, kept):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    files = {"file:1/model.onnx": data(onnx_files.scale(9)), f"file:{path}": b"x"}
    code, details = await refused(load(served, "m", config={}, **files))
    assert code is CODE.INTERNAL
    assert "is no path in a model's folder" in details
    assert await factor(served) == ("1", 2.0)
    assert kept() == []


async def test_types_of_unload_parameters(serve, models_folder: Repository):
    served = await serve(models_folder.root)
    asked = pb.RepositoryModelUnloadRequest(model_name="m")
    asked.parameters["unload_dependents"].string_param = "x"
    assert (await refused(served.stub.RepositoryModelUnload(asked)))[0] is CODE.INVALID_ARGUMENT
    asked = pb.RepositoryModelUnloadRequest(model_name="m")
    asked.parameters["foo"].bool_param = True
    assert (await refused(served.stub.RepositoryModelUnload(asked)))[0] is CODE.INVALID_ARGUMENT
    for asked in (
        served.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m", repository_name="r")),
        served.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="m", repository_name="r")),
    ):
        assert (await refused(asked))[0] is CODE.UNIMPLEMENTED


async def test_a_change_that_fails_leaves_what_serves_and_says_so(serve, models_folder: Repository):
    folder = models_folder.put("m", onnx_files.scale(1), config="version_policy { all {} }")
    models_folder.put("m", onnx_files.scale(2), version=2)
    served = await serve(models_folder.root)
    # One of the two is broken: none is replaced, although the other is not.
    (folder / "1/model.onnx").write_bytes(b"broken")
    (folder / "2/model.onnx").write_bytes(data(onnx_files.scale(5)))
    code, details = await refused(load(served, "m"))
    assert code is CODE.INVALID_ARGUMENT
    assert "version 1 is at UNAVAILABLE state: ONNX Runtime cannot load model.onnx" in details
    assert [await factor(served, version=v) for v in ("1", "2")] == [("1", 1.0), ("2", 2.0)]
    rows = await index(served)
    assert {state for state, _ in rows.values()} == {"READY"}
    assert all("its newer content was refused: " in reason for _, reason in rows.values())
    (folder / "1/model.onnx").write_bytes(data(onnx_files.scale(3)))
    await load(served, "m")
    assert [await factor(served, version=v) for v in ("1", "2")] == [("1", 3.0), ("2", 5.0)]
    assert {reason for _, reason in (await index(served)).values()} == {""}


async def test_what_was_given_goes_on_when_the_next_fails(serve, models_folder: Repository, kept):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    await load(served, "m", config={}, **{"file:5/model.onnx": data(onnx_files.scale(9))})
    assert (await refused(load(served, "m", config={}, **{"file:7/model.onnx": b"?"})))[0] is CODE.INVALID_ARGUMENT
    assert await factor(served) == ("5", 9.0)
    assert await index(served) == {("m", "5"): ("READY", "")}
    assert (await refused(load(served, "m", config={"name": "n"})))[0] is CODE.INTERNAL
    # Back to the repository's, which is broken meanwhile: what was given goes on.
    (models_folder.root / "m/1/model.onnx").write_bytes(b"?")
    assert (await refused(load(served, "m")))[0] is CODE.INVALID_ARGUMENT
    assert await factor(served) == ("5", 9.0)
    models_folder.put("m", onnx_files.scale(3))
    await load(served, "m")
    assert await factor(served) == ("1", 3.0)
    await until(lambda: kept() == [])


async def test_no_call_fails_while_models_are_loaded_again_and_again(serve, models_folder: Repository):
    folder = models_folder.put("m", onnx_files.scale(1))
    served = await serve(models_folder.root)
    stop, seen = asyncio.Event(), set()

    async def caller() -> None:
        while not stop.is_set():
            version, value = await factor(served)
            seen.add((version, value))

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    for value in range(2, 8):
        (folder / "1/model.onnx").write_bytes(data(onnx_files.scale(value)))
        await load(served, "m")
        await until(lambda value=value: ("1", float(value)) in seen)
        files = {f"file:{value}/model.onnx": data(onnx_files.scale(10 * value))}
        await load(served, "m", config={"max_batch_size": value}, **files)
        await until(lambda value=value: (str(value), 10.0 * value) in seen)
        await refused(load(served, "m", config={"max_batch_size": value}, **{f"file:{value}/model.onnx": b"?"}))
    stop.set()
    await asyncio.gather(*callers)
    assert len(seen) == 13


async def test_loads_of_one_model_at_the_same_time(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(1))
    served = await serve(models_folder.root)
    loads = [
        load(served, "m", config={}, **{"file:1/model.onnx": data(onnx_files.scale(value))}) for value in range(2, 12)
    ]
    await asyncio.gather(*loads)
    assert (await factor(served))[1] in range(2, 12)
    # Loads and unloads: whoever is overruled hears of it, the last word holds.
    words = [load(served, "m") if n % 2 else unload(served, "m") for n in range(20)]
    for outcome in await asyncio.gather(*words, return_exceptions=True):
        assert outcome is None or outcome.code() is CODE.ABORTED
    await load(served, "m")
    assert await factor(served) == ("1", 1.0)


async def test_an_unload_waits_for_nobody_for_ever_and_cuts_no_call(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.slow(300))
    served = await serve(models_folder.root)
    version = served.models.find("m", "")
    calls = [asyncio.ensure_future(served.stub.ModelInfer(request("m", x=X))) for _ in range(20)]
    await until(lambda: version._users + sum(call.done() for call in calls) >= len(calls))  # All have arrived.
    await unload(served, "m")
    for response in await asyncio.gather(*calls):
        assert float(output(response, "y")[0, 0]) == 2.0


async def test_who_goes_away_does_not_stop_a_load(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(1))
    served = await serve(models_folder.root)
    models_folder.put("m", onnx_files.scale(2))
    call = served.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m"))
    await call.wait_for_connection()
    await asyncio.sleep(0)
    call.cancel()
    files = {"file:1/model.onnx": data(onnx_files.scale(7))}
    await load(served, "m", config={}, **files)
    assert await factor(served) == ("1", 7.0)


async def test_a_folder_that_is_gone(serve, models_folder: Repository):
    models_folder.put("m", onnx_files.scale(2))
    served = await serve(models_folder.root)
    shutil.rmtree(models_folder.root / "m")
    assert (await refused(load(served, "m")))[0] is CODE.INTERNAL
    assert await factor(served) == ("1", 2.0)
    await unload(served, "m")
    assert (await refused(factor(served)))[0] is CODE.NOT_FOUND
    assert (await refused(load(served, "m", config={})))[0] is CODE.INTERNAL


async def test_the_extension_is_named(serve, models_folder: Repository):
    served = await serve(models_folder.root)
    extensions = (await served.stub.ServerMetadata(pb.ServerMetadataRequest())).extensions
    assert {"model_repository", "model_repository(unload_dependents)"} <= set(extensions)
