"""Which models are served unasked: all, only those named, or what a look at the folder finds."""

from __future__ import annotations

import asyncio
import os
import shutil
from functools import partial

import grpc
import pytest

from mesh.process.config import ConfigError
from mesh.process.config import load as load_config
from mesh.rpc.channel import connect
from services.infer.config import InferConfig
from services.infer.model_files.wanted_models import WantedModel
from services.infer.models.control import Control
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources.poll import Poll, stood_still
from services.infer.sources.repository import look, scan
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.breakable import until
from tests.free_ports import free_port
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request
from tests.infer.test_infer_process import Infer, serves

_PYTHON = """
class Model:
    inputs = outputs = {"x": ("FP32", [-1, 4])}

    def predict(self, batch):
        return {"x": batch["x"]}
"""


@pytest.fixture
async def models():
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits())) as models:
        yield models


def rows(models: Models) -> dict[tuple[str, int | None], tuple[str, str]]:
    return {(row.name, row.version): (row.state.value, row.reason) for row in models.index()}


async def test_explicit_serves_what_is_named(models, models_folder: Repository):
    for name in ("a", "b", "c"):
        models_folder.put(name, onnx_files.scale())
    root = models_folder.root
    async with Control(models, partial(look, root), initially=("a", "missing")) as control:
        control.offer(scan(root))
        await models.settled()
        assert rows(models) == {
            ("a", 1): ("READY", ""),
            ("b", None): ("", ""),
            ("c", None): ("", ""),
            ("missing", None): ("UNAVAILABLE", "the repository has no such model"),
        }
        assert not models.is_ready()
        await control.unload(pb.RepositoryModelUnloadRequest(model_name="missing"))
        assert models.is_ready()
        await control.load(pb.RepositoryModelLoadRequest(model_name="b"))
        await control.unload(pb.RepositoryModelUnloadRequest(model_name="a"))
        assert rows(models)["a", 1] == ("UNAVAILABLE", "unloaded")
        assert rows(models)["b", 1] == ("READY", "")
        # What the source offers anew changes no word.
        control.offer(scan(root))
        await models.settled()
        await until(lambda: models.names() == ["b"])


async def test_a_load_does_not_wait_for_an_ensemble_of_others(models, models_folder: Repository):
    models_folder.put("b", onnx_files.scale())
    models_folder.put("endless", onnx_files.endless())
    tensors = (
        "input { name: 'x' data_type: TYPE_FP32 dims: [-1, 4] } output { name: 'y' data_type: TYPE_FP32 dims: [-1, 4] }"
    )
    step = "step { model_name: 'endless' input_map { key: 'x' value: 'x' } output_map { key: 'y' value: 'y' } }"
    folder = models_folder.root / "pipeline"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(f"platform: 'ensemble' {tensors} ensemble_scheduling {{ {step} }}")
    root = models_folder.root
    async with Control(models, partial(look, root), initially=("pipeline", "endless")) as control:
        control.offer(scan(root))
        await until(lambda: models.needs("pipeline") == {"endless"}, "the ensemble waits for its model")
        await asyncio.wait_for(control.load(pb.RepositoryModelLoadRequest(model_name="b")), 30)
        assert rows(models)["b", 1] == ("READY", "")
        assert rows(models)["pipeline", 1][0] == "LOADING"


async def test_explicit_may_name_all_or_none(models, models_folder: Repository):
    models_folder.put("a", onnx_files.scale())
    async with Control(models, initially=()) as control:
        control.offer(scan(models_folder.root))
        await models.settled()
        assert rows(models) == {("a", None): ("", "")}
        assert models.is_ready()
    async with Control(models, initially=("*",)) as control:
        control.offer(scan(models_folder.root))
        await models.settled()
        assert rows(models) == {("a", 1): ("READY", "")}


async def test_a_source_that_tells_by_itself(models, models_folder: Repository):
    """As the store's registry: nobody is asked, an unloaded model stays so until it is loaded or gone."""
    models_folder.put("a", onnx_files.scale())
    offered = scan(models_folder.root)
    async with Control(models) as control:
        control.offer(offered)
        await models.settled()
        await control.unload(pb.RepositoryModelUnloadRequest(model_name="a"))
        control.offer(offered)
        await models.settled()
        assert rows(models) == {("a", 1): ("UNAVAILABLE", "unloaded")}
        await control.load(pb.RepositoryModelLoadRequest(model_name="a"))
        assert rows(models) == {("a", 1): ("READY", "")}
        await control.unload(pb.RepositoryModelUnloadRequest(model_name="a"))
        control.offer([])
        await until(lambda: rows(models) == {})
        control.offer(offered)
        await models.settled()
        assert rows(models) == {("a", 1): ("READY", "")}


A1, A2 = WantedModel("a", (), problem="1"), WantedModel("a", (), problem="2")


@pytest.mark.parametrize(
    ("offered", "before", "now", "expected"),
    [
        ({}, {}, {"a": A1}, {}),
        ({}, {"a": A1}, {"a": A1}, {"a": A1}),
        ({}, {"a": A1}, {"a": A2}, {}),
        ({"a": A1}, {"a": A1}, {"a": A2}, {"a": A1}),
        ({"a": A1}, {"a": A2}, {"a": A2}, {"a": A2}),
        ({"a": A1}, {"a": A1}, {}, {"a": A1}),
        ({"a": A1}, {}, {}, {}),
    ],
)
def test_what_stood_still(offered, before, now, expected):
    assert stood_still(offered, before, now) == expected


class Looks:
    """A repository that is looked at when the test says so."""

    def __init__(self, root) -> None:
        self.root = root
        self.turn: asyncio.Queue[None] = asyncio.Queue()
        self.waiting = 0
        self.offers: list[list[str]] = []

    async def pause(self) -> None:
        self.waiting += 1
        await self.turn.get()

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            before = self.waiting
            self.turn.put_nowait(None)
            await until(lambda before=before: self.waiting > before)


async def test_what_changes_is_served_once_it_stands_still(models, models_folder: Repository):
    root = models_folder.root
    models_folder.put("a", onnx_files.scale(2))
    looks = Looks(root)
    async with Control(models, partial(look, root)) as control:
        found = scan(root)
        control.offer(found)
        async with Poll(partial(scan, root), control.offer, found, looks.pause):
            await models.settled()
            await until(lambda: looks.waiting)
            first = models.find("a", "")
            await looks.look(3)
            assert models.find("a", "") is first
            models_folder.put("b", onnx_files.scale(3))
            await looks.look()
            assert rows(models) == {("a", 1): ("READY", "")}
            await looks.look()
            await models.settled()
            assert rows(models) == {("a", 1): ("READY", ""), ("b", 1): ("READY", "")}
            # Broken content is refused, and what was there goes on; then it is removed.
            (root / "a/1/model.onnx").write_bytes(b"?")
            await looks.look(2)
            await models.settled()
            assert rows(models)["a", 1][0] == "READY"
            assert "newer content was refused" in rows(models)["a", 1][1]
            shutil.rmtree(root / "b")
            await looks.look(2)
            await until(lambda: ("b", 1) not in rows(models))
            # A folder that cannot be read takes nothing away.
            root.rename(root.with_name("away"))
            await looks.look(3)
            assert models.find("a", "") is first


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"LOAD_MODELS": "a"}, "SHOAL_INFER_LOAD_MODELS needs SHOAL_INFER_MODEL_CONTROL=explicit"),
        ({"MODEL_CONTROL": "never"}, "SHOAL_INFER_MODEL_CONTROL"),
        ({"POLL_MS": "1"}, "SHOAL_INFER_POLL_MS"),
    ],
)
def test_settings_that_are_wrong(tmp_path, settings, named):
    environ = {"SHOAL_INFER_LISTEN": "127.0.0.1:0", "SHOAL_INFER_REPOSITORY": str(tmp_path)}
    environ |= {f"SHOAL_INFER_{name}": value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=named):
        load_config(InferConfig, "infer", environ)


def test_settings(tmp_path):
    environ = {
        "SHOAL_INFER_LISTEN": "127.0.0.1:0",
        "SHOAL_INFER_REPOSITORY": str(tmp_path),
        "SHOAL_INFER_MODEL_CONTROL": "explicit",
        "SHOAL_INFER_LOAD_MODELS": "a, b,,c",
    }
    assert load_config(InferConfig, "infer", environ).load_models == ("a", "b", "c")
    del environ["SHOAL_INFER_REPOSITORY"]
    environ |= {"SHOAL_INFER_CACHE_DIR": str(tmp_path), "SHOAL_INFER_MESH": "unix:/x"}
    environ |= {"SHOAL_INFER_MODEL_CONTROL": "poll", "SHOAL_INFER_LOAD_MODELS": ""}
    with pytest.raises(ConfigError, match="poll needs SHOAL_INFER_REPOSITORY"):
        load_config(InferConfig, "infer", environ)


async def test_a_process_that_polls(python, models_folder: Repository, tmp_path):
    models_folder.put("a", onnx_files.scale(2))
    infer = Infer(python, tmp_path / "log", repository=str(models_folder.root), model_control="poll", poll_ms="100")
    with infer:
        async with connect(infer.address) as channel:
            await until(lambda: serves(channel), "infer serving")
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            models_folder.put("b", onnx_files.scale(3))

            async def is_there() -> bool:
                return bool((await stub.ModelReady(pb.ModelReadyRequest(name="b"))).ready)

            await until(is_there)


async def test_a_process_that_is_told(python, models_folder: Repository, tmp_path):
    for name in ("a", "b"):
        models_folder.put(name, onnx_files.scale(2))
    settings = {"model_control": "explicit", "load_models": "b"}
    infer = Infer(python, tmp_path / "log", repository=str(models_folder.root), **settings)
    with infer:
        async with connect(infer.address) as channel:
            await until(lambda: serves(channel), "infer serving")
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            index = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
            assert [(m.name, m.version, m.state) for m in index] == [("a", "", ""), ("b", "1", "READY")]
            await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="a"))
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="c"))
            assert (await stub.ModelReady(pb.ModelReadyRequest(name="a"))).ready


@pytest.mark.parametrize("mode", ["none", "poll"])
async def test_load_and_unload_are_rejected_unread_in_other_modes(python, models_folder: Repository, tmp_path, mode):
    models_folder.put("a", onnx_files.scale(2))
    infer = Infer(python, tmp_path / "log", repository=str(models_folder.root), model_control=mode)
    load = pb.RepositoryModelLoadRequest(model_name="a")
    odd = pb.RepositoryModelLoadRequest(model_name="missing", repository_name="other")
    odd.parameters["file:1/../../x"].bool_param = True
    unload = pb.RepositoryModelUnloadRequest(model_name="a")
    odd_unload = pb.RepositoryModelUnloadRequest(model_name="missing", repository_name="other")
    with infer:
        async with connect(infer.address) as channel:
            await until(lambda: serves(channel), "infer serving")
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            calls = [stub.RepositoryModelLoad(load), stub.RepositoryModelLoad(odd)]
            calls += [stub.RepositoryModelUnload(unload), stub.RepositoryModelUnload(odd_unload)]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError, match="start the server with --model-control explicit") as err:
                    await call
                assert err.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            response = await stub.ModelInfer(request("a", x=floats([1, 2, 3, 4])))
            assert output(response, "y").tolist() == [[2, 4, 6, 8]]


@pytest.mark.parametrize("is_allowed", [False, True])
async def test_code_needs_permission_where_other_machines_reach_the_server(
    python, models_folder: Repository, tmp_path, is_allowed
):
    models_folder.put("a", onnx_files.scale(2))
    (models_folder.root / "b" / "1").mkdir(parents=True)
    (models_folder.root / "b" / "1" / "model.py").write_text(_PYTHON)
    port = free_port()
    settings = {"listen": f"0.0.0.0:{port}", "insecure": "true", "model_control": "explicit", "load_models": "*"}
    settings |= {"allow_code": "true"} if is_allowed else {}
    infer = Infer(python, tmp_path / "log", repository=str(models_folder.root), **settings)
    with infer:
        async with connect(f"127.0.0.1:{port}") as channel:
            await until(lambda: serves(channel), "infer serving")
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

            async def load(name: str, config: str, **files: bytes) -> str:
                asked = pb.RepositoryModelLoadRequest(model_name=name)
                asked.parameters["config"].string_param = config
                for file, data in files.items():
                    asked.parameters[file].bytes_param = data
                try:
                    await stub.RepositoryModelLoad(asked)
                except grpc.aio.AioRpcError as err:
                    return err.code().name if "--allow-code" in err.details() else err.details()
                return "OK"

            found = {row.name: row for row in (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models}
            assert found["a"].state == "READY"
            assert found["b"].state == ("READY" if is_allowed else "UNAVAILABLE")
            assert ("--allow-code" in found["b"].reason) is not is_allowed
            # Files of any kind count as code; a configuration alone does not.
            data = onnx_files.scale(3).SerializeToString()
            assert await load("c", "{}", **{"file:1/model.onnx": data}) == (
                "OK" if is_allowed else "FAILED_PRECONDITION"
            )
            evil = {"file:1/model.py": _PYTHON.encode()}
            assert await load("d", "{}", **evil) == ("OK" if is_allowed else "FAILED_PRECONDITION")
            assert await load("b", '{"backend": "python"}') == ("OK" if is_allowed else "INVALID_ARGUMENT")
            assert await load("a", '{"max_batch_size": 2}') == "OK"
            response = await stub.ModelInfer(request("a", x=floats([1, 2, 3, 4])))
            assert output(response, "y").tolist() == [[2, 4, 6, 8]]


@pytest.mark.parametrize(
    ("listen", "given", "allows"),
    [
        ("unix:/tmp/x.sock", None, True),
        ("127.0.0.1:1", None, True),
        ("0.0.0.0:1", None, False),
        ("0.0.0.0:1", "true", True),
        ("unix:/tmp/x.sock", "false", False),
    ],
)
def test_code_is_allowed_by_address_unless_said(tmp_path, listen, given, allows):
    environ = {"SHOAL_INFER_LISTEN": listen, "SHOAL_INFER_REPOSITORY": str(tmp_path), "SHOAL_INFER_INSECURE": "true"}
    environ |= {"SHOAL_INFER_ALLOW_CODE": given} if given is not None else {}
    assert load_config(InferConfig, "infer", environ).allows_code is allows


async def test_processes_that_share_a_port_are_not_split(python, models_folder: Repository, tmp_path):
    models_folder.put("a", onnx_files.scale(2))
    infer = Infer(python, tmp_path / "log", repository=str(models_folder.root), share_port="true")
    with infer:
        async with connect(infer.address) as channel:
            await until(lambda: serves(channel), "infer serving")
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            for asked in (
                stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="a")),
                stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="a")),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match="--model-control poll") as err:
                    await asked
                assert err.value.code() is grpc.StatusCode.UNIMPLEMENTED
            metadata = await stub.ServerMetadata(pb.ServerMetadataRequest())
            assert "model_repository" not in metadata.extensions


def test_a_repository_that_is_none(tmp_path):
    (tmp_path / "m" / "1").mkdir(parents=True)
    for root in (tmp_path / "none", tmp_path / "m", tmp_path / "m" / "1" / "x"):
        with pytest.raises(FailedPrecondition, match="folder"):
            scan(root)
    assert os.listdir(tmp_path) == ["m"]


async def test_an_unload_does_not_wait_for_ever(models, models_folder: Repository, monkeypatch):
    monkeypatch.setattr("services.infer.models.control._UNLOAD_S", 0.01)
    models_folder.put("a", onnx_files.scale())
    async with Control(models, partial(look, models_folder.root)) as control:
        control.offer(scan(models_folder.root))
        await models.settled()
        with models.use("a", ""):
            await control.unload(pb.RepositoryModelUnloadRequest(model_name="a"))
            assert rows(models) == {("a", 1): ("UNLOADING", "")}
            # It may be loaded again while the old one still has a call.
            await control.load(pb.RepositoryModelLoadRequest(model_name="a"))
            assert rows(models) == {("a", 1): ("READY", "")}
            await control.unload(pb.RepositoryModelUnloadRequest(model_name="a"))
        await until(lambda: rows(models) == {("a", 1): ("UNAVAILABLE", "unloaded")})


def test_one_file_as_a_repository(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    file.touch()
    (model,) = scan(file)
    assert (model.name, model.problem) == ("caf\\xe9.onnx", "its name is not UTF-8: rename it")
    assert scan(tmp_path) == [model]
    file = file.rename(tmp_path / ".hidden.onnx")
    assert [found.name for found in scan(file)] == [".hidden"]
    assert look(file, ".hidden") == scan(file)[0]
    assert look(file, "hidden") is None
    file.unlink()
    with pytest.raises(FailedPrecondition, match=r"give a folder of models, or one \.onnx file"):
        scan(file)
