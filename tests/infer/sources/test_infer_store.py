"""infer over the real store: models that are pushed, replaced, aliased and removed, and a store that goes away."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from pathlib import Path

import grpc
import onnx
import pytest

from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import Directory, ReadyModel, State
from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.breakable import Process, until
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request
from tests.infer.test_infer_process import serves

pytestmark = pytest.mark.mongo

X = floats([1, 2, 3, 4])


class Infer(Process):
    """An infer process, and what it was told."""

    def __init__(self, python: str, log: Path, env: Mapping[str, str]) -> None:
        super().__init__([python, "-m", "services.infer"], log, env)
        self.env = env


class Node:
    """A store and an infer that reaches it directly, where Envoy would be."""

    def __init__(self, python: str, run_dir: Path, tmp_path: Path, mongo_uri: str, database: str) -> None:
        self.store_at, self.infer_at = f"unix:{run_dir}/store.sock", f"unix:{run_dir}/infer.sock"
        self.cache = tmp_path / "cache"
        self.store = Process(
            [python, "-m", "services.store"],
            tmp_path / "store.log",
            {
                "SHOAL_STORE_INSTANCE": "store-0",
                "SHOAL_STORE_LISTEN": self.store_at,
                "SHOAL_STORE_MONGO": mongo_uri,
                "SHOAL_STORE_DATABASE": database,
                "SHOAL_STORE_BLOBS": f"file://{tmp_path}/blobs",
                "SHOAL_STORE_DRAIN_MS": "100",
            },
        )
        self._python, self._log = python, tmp_path / "infer.log"
        self.infer = self.infer_with()

    def infer_with(self, **env: str) -> Infer:
        """An infer process with more settings."""
        settings = {
            "SHOAL_INFER_LISTEN": self.infer_at,
            "SHOAL_INFER_MESH": self.store_at,
            "SHOAL_INFER_CACHE_DIR": str(self.cache),
        }
        return Infer(self._python, self._log, {**settings, **env})

    async def push(self, name: str, model: onnx.ModelProto | str, *, config: str = "") -> int:
        """Stores and registers the next version of a model, or of the source of a model.py; returns its number."""
        async with connect(self.store_at) as channel:
            stub = store_pb2_grpc.StoreServiceStub(channel)
            if isinstance(model, str):
                files = [await put(stub, "model.py", model.encode())]
            else:
                files = [await put(stub, "model.onnx", model.SerializeToString())]
            if config:
                files.append(await put(stub, "../config.pbtxt", config.encode()))
            asked = store_pb2.RegisterModelRequest(model=store_pb2.ModelVersion(name=name, files=files))
            response = await stub.RegisterModel(asked)
            return response.model.version

    async def alias(self, name: str, version: int) -> None:
        async with connect(self.store_at) as channel:
            asked = store_pb2.SetAliasRequest(name=name, alias="stable", version=version)
            await store_pb2_grpc.StoreServiceStub(channel).SetAlias(asked)

    async def remove(self, name: str) -> None:
        async with connect(self.store_at) as channel:
            await store_pb2_grpc.StoreServiceStub(channel).RemoveModel(store_pb2.RemoveModelRequest(name=name))

    async def is_store_reachable(self) -> bool:
        try:
            async with connect(self.store_at) as channel:
                await store_pb2_grpc.StoreServiceStub(channel).ListModels(store_pb2.ListModelsRequest())
        except grpc.aio.AioRpcError:
            return False
        return True

    async def outcome(self, name: str) -> tuple[str, float] | str:
        """Outcome of an inference: (version, first value), or the error's status."""
        try:
            async with connect(self.infer_at) as channel:
                stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                got = await stub.ModelInfer(request(name, x=X))
        except grpc.aio.AioRpcError as err:
            return err.code().name
        return got.model_version, float(output(got, "y")[0, 0])

    async def index(self) -> dict[tuple[str, str], str]:
        async with connect(self.infer_at) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            rows = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
        return {(row.name, row.version): row.state for row in rows}

    async def until_outcome(self, name: str, expected: object) -> None:
        async def is_so() -> bool:
            return await self.outcome(name) == expected

        await until(is_so, f"outcome {expected} of {name}")


async def put(stub, path: str, data: bytes) -> store_pb2.ModelFile:
    sha256 = hashlib.sha256(data).hexdigest()
    header = store_pb2.PutArtifactRequest.Header(sha256=sha256, size_bytes=len(data))
    await stub.PutArtifact(
        iter([store_pb2.PutArtifactRequest(header=header), store_pb2.PutArtifactRequest(chunk=data)])
    )
    return store_pb2.ModelFile(path=path, sha256=sha256, size_bytes=len(data))


@pytest.fixture
def node(python, run_dir, tmp_path, mongo_uri, mongo_database) -> Node:
    return Node(python, run_dir, tmp_path, mongo_uri, mongo_database)


async def test_models_come_from_the_store_and_go_with_it(node):
    with node.infer:
        # Up before the store is: it knows no model yet, and says so.
        await node.until_outcome("m", "NOT_FOUND")
        with node.store:
            await until(node.is_store_reachable, "store")
            assert await node.push("m", onnx_files.scale(2)) == 1
            await node.until_outcome("m", ("1", 2.0))
            assert await node.push("m", onnx_files.scale(3)) == 2
            await node.until_outcome("m", ("2", 3.0))
            await node.alias("m", 1)
            await node.until_outcome("m", ("1", 2.0))
            assert await node.index() == {("m", "1"): "READY", ("m", "2"): "READY"}
            await node.push("bad", onnx_files.unservable())
            await until(lambda: _has(node, ("bad", "1"), "UNAVAILABLE"))
            await node.push("own", onnx_files.scale(7), config='name: "other" max_batch_size: 2')
            await node.until_outcome("own", ("1", 7.0))
            await node.remove("bad")
            await node.remove("own")
            await node.until_outcome("own", "NOT_FOUND")
        # The store is gone: what was served still is, also by the next process.
        assert await node.outcome("m") == ("1", 2.0)
        node.infer.kill()
        node.infer.start()
        await node.until_outcome("m", ("1", 2.0))
        assert await node.index() == {("m", "1"): "READY", ("m", "2"): "READY"}
        # And it follows the store again when that is back.
        with node.store:
            await until(node.is_store_reachable, "store")
            await node.push("m", onnx_files.scale(4))
            await until(lambda: _has(node, ("m", "3"), "READY"))
            await node.remove("m")
            await node.until_outcome("m", "NOT_FOUND")
        assert node.infer.terminate() == 0
    assert not list((node.cache / "open" / "infer-0").iterdir())


# `python -m services.infer`, whose start does not wait half a minute for the first load of each model.
IMPATIENT = """
import runpy
from services.infer import app
app._START_S = 0.5
runpy.run_module("services.infer", run_name="__main__")
"""


async def test_a_model_whose_load_does_not_end_keeps_no_other_from_being_served(node, python):
    with node.store:
        await until(node.is_store_reachable, "store")
        await node.push("endless", onnx_files.endless())
        await node.push("m", onnx_files.scale(2))
        infer = node.infer_with()
        infer._argv = [python, "-c", IMPATIENT]
        with infer:
            async with connect(node.infer_at) as channel:
                await until(lambda: serves(channel), "infer serving")
            await node.until_outcome("m", ("1", 2.0))
            assert await node.outcome("endless") == "UNAVAILABLE"
            await node.push("later", onnx_files.scale(3))
            await node.until_outcome("later", ("1", 3.0))
            await node.remove("endless")
            await node.until_outcome("endless", "NOT_FOUND")


@pytest.mark.etcd
async def test_the_membership_has_what_is_ready_and_code_from_the_store_does_not_run_where_it_is_forbidden(
    node, etcd_address, tmp_path
):
    settings = {"SHOAL_INFER_ETCD": etcd_address, "SHOAL_INFER_NODE": f"n{uuid.uuid4().hex[:8]}"}
    node.infer = node.infer_with(**settings, SHOAL_INFER_ALLOW_CODE="false")
    async with Etcd(etcd_address) as etcd, Directory(etcd) as directory:

        def told() -> tuple[State, tuple[ReadyModel, ...]] | None:
            here = [i for i in directory.view.instances if i.node == node.infer.env["SHOAL_INFER_NODE"]]
            return (here[0].state, here[0].models) if here else None

        with node.store, node.infer:
            await until(node.is_store_reachable, "store")
            await until(lambda: told() == (State.READY, ()))
            await node.push("m", onnx_files.scale(2))
            await until(lambda: told() == (State.READY, (ReadyModel("m", (1,)),)))
            await node.push("code", f"open({str(tmp_path / 'ran')!r}, 'x')")
            await until(lambda: _has(node, ("code", "1"), "UNAVAILABLE"))
            assert not (tmp_path / "ran").exists()
            assert await node.outcome("m") == ("1", 2.0)
            await node.remove("code")
            await node.push("m", onnx_files.scale(3))
            await until(lambda: told() == (State.READY, (ReadyModel("m", (2,)),)))
            await node.remove("m")
            await until(lambda: told() == (State.READY, ()))
            assert node.infer.terminate() == 0
            await until(lambda: told() is None)


async def _has(node: Node, key: tuple[str, str], state: str) -> bool:
    return (await node.index()).get(key) == state
