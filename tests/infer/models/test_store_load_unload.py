"""Load and unload on a replica whose models come from the store: the word holds there, over what the store says."""

from __future__ import annotations

import grpc
import pytest

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.sources.test_infer_store import Node

pytestmark = pytest.mark.mongo


@pytest.fixture
def node(python, run_dir, tmp_path, mongo_uri, mongo_database) -> Node:
    return Node(python, run_dir, tmp_path, mongo_uri, mongo_database)


async def load(node: Node, name: str, config: str = "", **files: bytes) -> str:
    """Its status."""
    asked = pb.RepositoryModelLoadRequest(model_name=name)
    if config:
        asked.parameters["config"].string_param = config
    for path, data in files.items():
        asked.parameters[path].bytes_param = data
    async with connect(node.infer_at) as channel:
        try:
            await inference_pb2_grpc.GRPCInferenceServiceStub(channel).RepositoryModelLoad(asked)
        except grpc.aio.AioRpcError as err:
            return err.code().name
    return "OK"


async def unload(node: Node, name: str) -> None:
    async with connect(node.infer_at) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name))


async def test_the_word_holds_over_the_stores(node):
    with node.store, node.infer_with(SHOAL_INFER_MODEL_CONTROL="explicit", SHOAL_INFER_LOAD_MODELS="*"):
        await until(node.is_store_reachable, "store")
        await node.push("m", onnx_files.scale(2))
        await node.push("other", onnx_files.scale(9))
        await node.until_outcome("m", ("1", 2.0))
        await node.until_outcome("other", ("1", 9.0))
        assert await load(node, "m") == "OK"
        assert await load(node, "missing") == "INTERNAL"
        await unload(node, "m")
        assert await node.outcome("m") == "NOT_FOUND"
        # A new version changes nothing of that; a load serves it.
        await node.push("m", onnx_files.scale(3))
        await node.push("third", onnx_files.scale(4))
        await node.until_outcome("third", ("1", 4.0))
        assert await node.outcome("m") == "NOT_FOUND"
        assert await load(node, "m") == "OK"
        assert await node.outcome("m") == ("2", 3.0)
        # Another configuration, and other files, on this replica.
        assert await load(node, "m", '{"version_policy": {"specific": {"versions": [1]}}}') == "OK"
        assert await node.outcome("m") == ("1", 2.0)
        data = onnx_files.scale(8).SerializeToString()
        assert await load(node, "m", "{}", **{"file:5/model.onnx": data}) == "OK"
        assert await node.outcome("m") == ("5", 8.0)
        assert await load(node, "m", "{}", **{"file:6/model.onnx": b"?"}) == "INVALID_ARGUMENT"
        assert await node.outcome("m") == ("5", 8.0)
        assert await load(node, "m") == "OK"
        assert await node.outcome("m") == ("2", 3.0)
        # Once the store has it no more, the word is forgotten with it.
        await unload(node, "other")
        await node.remove("other")
        await until(lambda: _is_forgotten(node, "other"))
        await node.push("other", onnx_files.scale(5))
        await until(lambda: _has_factor(node, "other", 5.0))


async def _is_forgotten(node: Node, name: str) -> bool:
    return name not in {model for model, _ in await node.index()}


async def _has_factor(node: Node, name: str, factor: float) -> bool:
    outcome = await node.outcome(name)
    return isinstance(outcome, tuple) and outcome[1] == factor
