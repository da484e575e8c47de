"""Stateful models over a real connection: what a client sees of sequences."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer.conftest import Repository, floats, output, request
from tests.infer.onnx_files import remembering
from tests.infer.sequences.stateful_models import config, put, step

START_IT = "must specify the START flag on the first request of the sequence"


@pytest.fixture
async def served(serve, models_folder: Repository):
    put(models_folder, "direct", config("direct { }"))
    put(models_folder, "oldest", config("oldest { max_candidate_sequences: 8 }"))
    put(models_folder, "brief", config("direct { }", rows=2, idle_us=50_000))
    put(models_folder, "single", config("", rows=1))
    return await serve(models_folder.root)


async def test_the_id_among_the_outputs_is_no_dependence_on_other_rows(serve, models_folder: Repository, caplog):
    oldest = config("oldest { max_candidate_sequences: 8 }")
    put(models_folder, "stated", oldest)
    put(models_folder, "guessed", oldest.replace("max_batch_size: 4", ""))
    served = await serve(models_folder.root)
    assert not [record.args for record in caplog.records if record.levelname == "WARNING"]
    for model in ("stated", "guessed"):
        assert numbers(await served.stub.ModelInfer(step(model, 7, 1, start=True))) == (1, 2)


async def refused(call) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await call
    return err.value.code().name, err.value.details()


def numbers(response: pb.ModelInferResponse) -> tuple[float, float]:
    return float(output(response, "total")[0, 0]), float(output(response, "product")[0, 0])


@pytest.mark.parametrize("model", ["direct", "oldest", "single"])
async def test_each_step_gets_the_states_of_the_last_one(served, model):
    infer = served.stub.ModelInfer
    first = await infer(step(model, 7, 1, start=True))
    assert numbers(first) == (1, 2)
    assert output(first, "told").tolist() == [[1, 0, 1]]
    assert output(first, "id").tolist() == [[7]]
    assert numbers(await infer(step(model, 7, 2))) == (3, 6)
    last = await infer(step(model, 7, 3, end=True))
    assert numbers(last) == (6, 24)
    assert output(last, "told").tolist() == [[0, 1, 1]]
    code, message = await refused(infer(step(model, 7, 1)))
    assert code == "INVALID_ARGUMENT"
    assert f"inference request for sequence 7 to model '{model}' {START_IT}" in message


@pytest.mark.parametrize("model", ["direct", "oldest"])
async def test_sequences_share_executions_and_no_state(served, model):
    infer = served.stub.ModelInfer
    await asyncio.gather(*(infer(step(model, n, n, start=True)) for n in (1, 2, 3)))
    for k in (2, 3, 4):
        responses = await asyncio.gather(*(infer(step(model, n, n)) for n in (3, 1, 2)))
        assert [numbers(each)[0] for each in responses] == [3 * k, 1 * k, 2 * k]
    (stats,) = (await served.stub.ModelStatistics(pb.ModelStatisticsRequest(name=model))).model_stats
    assert stats.inference_count == 12
    await asyncio.gather(*(infer(step(model, n, end=True)) for n in (1, 2, 3)))


async def test_a_start_restarts(served):
    infer = served.stub.ModelInfer
    for _ in range(2):
        assert numbers(await infer(step("direct", 5, 4, start=True))) == (4, 5)
        assert numbers(await infer(step("direct", 5, 4))) == (8, 25)
    both = await infer(step("direct", 5, 1, start=True, end=True))
    assert numbers(both) == (1, 2)
    assert output(both, "told").tolist() == [[1, 1, 1]]


async def test_ids_are_numbers_or_texts(served, serve, models_folder):
    infer = served.stub.ModelInfer
    signed, unsigned = step("direct", -1, start=True), step("direct", None)
    unsigned.parameters["sequence_id"].uint64_param = 2**64 - 1
    assert output(await infer(signed), "id").tolist() == [[-1]]
    assert numbers(await infer(unsigned))[0] == 2, "the same bits are the same sequence"
    code, message = await refused(infer(step("direct", "abc", start=True)))
    assert (code, "CONTROL_SEQUENCE_CORRID is INT64" in message) == ("INVALID_ARGUMENT", True)
    for empty in (0, "", None):
        code, message = await refused(infer(step("direct", empty, start=True)))
        assert code == "INVALID_ARGUMENT"
        assert message == "inference request to model 'direct' must specify a non-zero or non-empty correlation ID"


async def test_a_step_has_one_row(served):
    two = step("direct", 3, start=True)
    two.inputs[0].shape[0] = 2
    two.raw_input_contents[0] *= 2
    code, message = await refused(served.stub.ModelInfer(two))
    assert code == "INVALID_ARGUMENT"
    assert "must specify batch-size 1 due to requirements of sequence batcher, got 2" in message


async def test_clients_see_neither_controls_nor_states(served):
    metadata = await served.stub.ModelMetadata(pb.ModelMetadataRequest(name="direct"))
    assert [tensor.name for tensor in metadata.inputs] == ["x"]
    assert [tensor.name for tensor in metadata.outputs] == ["total", "product", "told", "id"]
    code, message = await refused(served.stub.ModelInfer(request("direct", x=floats([1]), START=floats([1]))))
    assert (code, "START" in message) == ("INVALID_ARGUMENT", True)
    got = (await served.stub.ModelConfig(pb.ModelConfigRequest(name="direct"))).config
    assert got.sequence_batching.max_sequence_idle_microseconds == 1_000_000
    assert [each.name for each in got.sequence_batching.control_input] == ["START", "END", "READY", "CORRID"]
    assert [state.output_name for state in got.sequence_batching.state] == ["total_out", "product_out"]


async def test_a_step_that_fails_leaves_the_sequence_as_it_was(served):
    infer = served.stub.ModelInfer
    await infer(step("direct", 1, 5, start=True))
    assert (await refused(infer(step("direct", 1, 2000))))[0] == "INTERNAL"
    assert numbers(await infer(step("direct", 1, 1))) == (6, 12)
    # A failed start has begun nothing.
    assert (await refused(infer(step("direct", 1, 2000, start=True))))[0] == "INTERNAL"
    assert START_IT in (await refused(infer(step("direct", 1, 1))))[1]


async def test_only_failing_steps_of_a_batch_fail(served):
    infer = served.stub.ModelInfer
    await asyncio.gather(*(infer(step("direct", n, n, start=True)) for n in (1, 2, 3, 4)))
    calls = [infer(step("direct", n, 2000 if n == 3 else 1)) for n in (1, 2, 3, 4)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(each, grpc.aio.AioRpcError) for each in outcomes] == [False, False, True, False]
    totals = [numbers(await infer(step("direct", n, 1, end=True)))[0] for n in (1, 2, 3, 4)]
    assert totals == [3, 4, 4, 6]


async def test_an_idle_sequence_ends_and_frees_its_slot(served):
    infer = served.stub.ModelInfer
    await asyncio.gather(infer(step("brief", 1, start=True)), infer(step("brief", 2, start=True)))
    # Both places are taken: the third waits until one has been idle for too long.
    assert numbers(await infer(step("brief", 3, start=True, end=True), timeout=20)) == (1, 2)
    version = served.models.find("brief", "")
    await until(lambda: len(version.scheduler.table) == 0, "all sequences are over")
    code, message = await refused(infer(step("brief", 1)))
    assert (code, START_IT in message) == ("INVALID_ARGUMENT", True)


async def test_steps_of_one_sequence_run_in_order_whatever_their_size(served):
    """Sent at once on one stream: the responses show the order, and none is lost."""

    async def sent():
        yield step("oldest", 9, 0, start=True)
        for n in range(1, 40):
            yield step("oldest", 9, n)
        yield step("oldest", 9, 0, end=True)

    stream = served.stub.ModelStreamInfer(sent())
    totals = [numbers(response.infer_response)[0] async for response in stream]
    assert totals == [*np.cumsum(range(40)).tolist(), float(sum(range(40)))]


async def test_a_stream_goes_on_after_an_error(served):
    async def sent():
        yield step("direct", 9, 1)
        yield step("direct", 9, 1, start=True)
        yield step("direct", 9, 1, end=True)

    responses = [response async for response in served.stub.ModelStreamInfer(sent())]
    assert START_IT in responses[0].error_message
    assert [numbers(response.infer_response)[0] for response in responses[1:]] == [1, 2]


async def test_explain_and_statistics(served):
    asked = step("oldest", 4, start=True, end=True)
    asked.parameters["explain"].bool_param = True
    said = (await served.stub.ModelInfer(asked)).parameters
    assert said["replica"].string_param == "test/infer-0"
    assert said["batch_size"].int64_param == 1
    assert said["fired"].string_param == "idle"
    await refused(served.stub.ModelInfer(step("oldest", 4)))
    (stats,) = (await served.stub.ModelStatistics(pb.ModelStatisticsRequest(name="oldest"))).model_stats
    assert stats.inference_stats.success.count == 1
    assert stats.inference_stats.fail.count == 1


async def test_a_new_version_and_an_unload_end_the_sequences_of_the_old(served, models_folder: Repository):
    infer, load = served.stub.ModelInfer, served.stub.RepositoryModelLoad
    assert numbers(await infer(step("direct", 5, 4, start=True))) == (4, 5)
    put(models_folder, "direct", config("direct { }", rows=3))  # Another content: it is loaded anew.
    await load(pb.RepositoryModelLoadRequest(model_name="direct"), timeout=30)
    code, message = await refused(infer(step("direct", 5, 1)))
    assert (code, START_IT in message) == ("INVALID_ARGUMENT", True)
    assert numbers(await infer(step("direct", 5, 2, start=True))) == (2, 3)
    await served.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="direct"), timeout=30)
    await load(pb.RepositoryModelLoadRequest(model_name="direct"), timeout=30)
    code, message = await refused(infer(step("direct", 5, 1)))
    assert (code, START_IT in message) == ("INVALID_ARGUMENT", True)


async def test_states_that_grow_are_bounded_for_each_tenant(serve, models_folder: Repository):
    state = 'state { input_name: "seen_in" output_name: "seen_out" data_type: TYPE_FP32 dims: [ 1, -1 ] }'
    strategy = "oldest { max_candidate_sequences: 64 } max_sequence_idle_microseconds: 60000000"
    models_folder.put("seen", remembering(), config=f"max_batch_size: 0 sequence_batching {{ {strategy} {state} }}")
    served = await serve(models_folder.root, state_bytes=3 << 20)

    async def seen(tenant: str, id: int, kib: int, *, start: bool = False) -> int:
        made = request("seen", x=np.ones((1, kib << 8), np.float32))
        made.parameters["sequence_id"].int64_param = id
        made.parameters["sequence_start"].bool_param = start
        response = await served.stub.ModelInfer(made, metadata=[("x-shoal-tenant", tenant)])
        return int(output(response, "count")[0])

    # The initial state is one zero.
    assert await seen("flood", 1, 1000, start=True) == 256_001
    for more in (1, 2):
        code, said = await refused(seen("flood", 2 * more, 1100, start=True))
        assert code == "RESOURCE_EXHAUSTED"
        assert "SHOAL_INFER_STATE_BYTES" in said
    code, _ = await refused(seen("flood", 1, 1100))
    assert code == "RESOURCE_EXHAUSTED"
    assert await seen("flood", 1, 1) == 256_001 + 256, "the state of the last successful step"
    assert await seen("acme", 1, 500, start=True) == 128_001
