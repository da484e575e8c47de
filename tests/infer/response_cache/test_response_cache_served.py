"""The response cache of a served model: responses, counts, explain, and its end with the model."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from onnx import TensorProto

from services.infer.sources import repository
from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

CACHED = "response_cache { enable: true }"
X = floats([1, 2, 3, 4])


@pytest.fixture
async def served(serve, models_folder: Repository):
    models_folder.put("double", onnx_files.scale(), config=CACHED)
    models_folder.put("text", onnx_files.identity(TensorProto.STRING, ("n", "k")), config=CACHED)
    models_folder.put("any", onnx_files.identity(dims=("n", "k")), config=CACHED)
    models_folder.put("reshape", onnx_files.reshaping(), config=CACHED)
    models_folder.put("lookup", onnx_files.lookup(), config=CACHED)
    models_folder.put("slow", onnx_files.slow(1500), config=CACHED)
    models_folder.bare("plain", onnx_files.scale())
    return await serve(models_folder.root)


def explained(asked: pb.ModelInferRequest) -> pb.ModelInferRequest:
    asked.parameters["explain"].bool_param = True
    return asked


async def counted(served, model: str) -> pb.ModelStatistics:
    return (await served.stub.ModelStatistics(pb.ModelStatisticsRequest(name=model))).model_stats[0]


async def test_a_repeated_request_is_served_from_memory(served):
    for cache in ("miss", "hit", "hit"):
        response = await served.stub.ModelInfer(explained(request("double", id=cache, x=X)))
        np.testing.assert_array_equal(output(response, "y"), 2 * X)
        told = response.parameters
        assert (response.id, told["cache"].string_param) == (cache, cache)
        assert told["batch_size"].int64_param == (cache == "miss")
    told = await counted(served, "double")
    stats = told.inference_stats
    assert (stats.success.count, stats.cache_hit.count, stats.cache_miss.count) == (3, 2, 1)
    assert (stats.queue.count, stats.compute_infer.count) == (3, 1)
    assert (told.execution_count, told.inference_count) == (1, 1)
    assert 0 < stats.cache_hit.ns <= stats.success.ns
    assert stats.cache_miss.ns > 0


async def test_a_model_without_a_cache_says_so(served):
    for _ in range(2):
        response = await served.stub.ModelInfer(explained(request("plain", x=X)))
        assert response.parameters["cache"].string_param == "off"
    assert (await counted(served, "plain")).execution_count == 2


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 2), (1, 6)]])
async def test_the_same_bytes_in_another_shape_are_another_request(served, shapes):
    values = np.arange(6, dtype=np.float32)
    for shape in [*shapes, *shapes]:
        response = await served.stub.ModelInfer(request("any", x=values.reshape(shape)))
        np.testing.assert_array_equal(output(response, "y"), values.reshape(shape))
        reshaped = request("reshape", x=values, shape=np.array([shape[0], shape[1]]))
        np.testing.assert_array_equal(output(await served.stub.ModelInfer(reshaped), "y"), values.reshape(shape))
    assert (await counted(served, "any")).inference_stats.cache_hit.count == len(shapes)


async def test_text_comes_back_as_it_was(served):
    words = np.array([[b"fish", "école".encode(), b""], [b"", b"a\0b", b"\xf0\x9f\x90\x9f"]], object)
    for _ in range(2):
        assert output(await served.stub.ModelInfer(request("text", x=words)), "y").tolist() == words.tolist()
    assert (await counted(served, "text")).inference_stats.cache_hit.count == 1


async def test_classification_is_another_request(served):
    asked = request("double", x=X)
    await served.stub.ModelInfer(asked)
    asked.outputs.add(name="y").parameters["classification"].int64_param = 1
    for _ in range(2):
        assert output(await served.stub.ModelInfer(asked), "y").tolist() == [[b"8.000000:3"]]
    np.testing.assert_array_equal(output(await served.stub.ModelInfer(request("double", x=X)), "y"), 2 * X)


async def test_an_error_is_not_stored(served):
    asked = request("lookup", i=np.array([[7]]))
    for _ in range(2):
        with pytest.raises(Exception, match="Failed to process"):
            await served.stub.ModelInfer(asked)
    stats = (await counted(served, "lookup")).inference_stats
    assert (stats.fail.count, stats.success.count, stats.cache_hit.count, stats.cache_miss.count) == (2, 0, 0, 0)


async def test_concurrent_equal_requests_run_once_even_when_the_leader_leaves(served):
    asked = explained(request("slow", x=X))
    leader = served.stub.ModelInfer(asked)
    version = served.models.find("slow", "")
    await until(lambda: version.response_cache._flights or version.statistics.executions, every_s=0.001)
    calls = [asyncio.ensure_future(served.stub.ModelInfer(asked)) for _ in range(15)]
    leader.cancel()
    states = []
    for response in await asyncio.gather(*calls):
        np.testing.assert_array_equal(output(response, "y"), 2 * X)
        states.append(response.parameters["cache"].string_param)
    # Whether a caller comes while it runs or after is a matter of chance.
    assert set(states) <= {"miss", "shared", "hit"}
    told = await counted(served, "slow")
    assert told.execution_count <= 2


async def test_explain_reports_the_cache_on_a_stream(served):
    async def requests():
        for n in range(3):
            yield explained(request("double", id=str(n), x=X))

    states = []
    async for response in served.stub.ModelStreamInfer(requests()):
        np.testing.assert_array_equal(output(response.infer_response, "y"), 2 * X)
        states.append(response.infer_response.parameters["cache"].string_param)
    assert states.count("miss") == 1
    assert set(states) <= {"miss", "shared", "hit"}


async def test_another_content_is_another_model(served, models_folder):
    asked = request("double", x=X)
    np.testing.assert_array_equal(output(await served.stub.ModelInfer(asked), "y"), 2 * X)
    models_folder.put("double", onnx_files.scale(5), version=2, config=CACHED)
    served.models.want(repository.scan(models_folder.root))
    await served.models.settled()
    await until(lambda: [v.number for v in served.models.versions("double")] == [2])
    for _ in range(2):
        np.testing.assert_array_equal(output(await served.stub.ModelInfer(asked), "y"), 5 * X)


async def test_unloading_gives_the_memory_back(served, models_folder):
    store = served.models._context.responses
    for n in range(5):
        await served.stub.ModelInfer(request("double", x=floats([n, 0, 0, 0])))
        await served.stub.ModelInfer(request("any", x=floats([n, 0, 0, 0])))
    assert len(store) == 10
    served.models.want([model for model in repository.scan(models_folder.root) if model.name != "double"])
    await until(lambda: len(store) == 5)
    served.models.want([])
    await until(lambda: (len(store), store.size_bytes) == (0, 0))


async def test_a_wrong_setting_makes_the_model_unavailable(serve, models_folder):
    ttl = 'parameters { key: "response_cache_ttl_ms" value { string_value: "soon" } }'
    models_folder.put("soon", onnx_files.scale(), config=CACHED + ttl)
    served = await serve(models_folder.root)
    [row] = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert row.state == "UNAVAILABLE"
    assert "response_cache_ttl_ms 'soon'" in row.reason
