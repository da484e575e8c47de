"""The protocol over a real connection: what each method returns, and the table of errors."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto

from mesh.rpc.framing import MessageParts
from services.infer import model_stream_infer
from shoal.errors import ERROR_CODE_PARAMETER, Code
from shoal.inference.v2 import inference_pb2 as pb
from shoal.tenant_header import TENANT_HEADER
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

TRIPLE_CONFIG = """
max_batch_size: 8
input [{ name: "x" data_type: TYPE_FP32 dims: 4 }]
output [{ name: "y" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }]
version_policy { all {} }
"""


@pytest.fixture
async def served(serve, models_folder: Repository):
    models_folder.bare("double", onnx_files.scale(2))
    models_folder.bare("add", onnx_files.add())
    models_folder.bare("lookup", onnx_files.lookup())
    models_folder.bare("text", onnx_files.identity(TensorProto.STRING, ("n", 2)))
    models_folder.bare("half", onnx_files.identity(TensorProto.FLOAT16))
    models_folder.bare("reshape", onnx_files.reshaping())
    models_folder.put("broken", b"this is no model", config="")
    folder = models_folder.put("triple", onnx_files.scale(3), config=TRIPLE_CONFIG)
    models_folder.put("triple", onnx_files.scale(30), version=2)
    (folder / "labels.txt").write_text("ant\nbee\n\ncat\n")
    return await serve(models_folder.root)


async def refused(call) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await call
    return err.value.code().name, err.value.details()


async def test_health_and_metadata(served):
    stub = served.stub
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    # One of its models is broken.
    assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
    server = await stub.ServerMetadata(pb.ServerMetadataRequest())
    assert server.name == "shoal"
    assert "classification" in server.extensions
    assert not {"system_shared_memory", "trace", "logging"} & set(server.extensions)
    for name, version, ready in [
        ("double", "", True),
        ("double", "1", True),
        ("double", "2", False),
        ("broken", "", False),
        ("nope", "", False),
    ]:
        assert (await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))).ready is ready, name
    meta = await stub.ModelMetadata(pb.ModelMetadataRequest(name="triple"))
    assert (meta.name, list(meta.versions), meta.platform) == ("triple", ["1", "2"], "onnxruntime_onnx")
    assert [(i.name, i.datatype, list(i.shape)) for i in meta.inputs] == [("x", "FP32", [-1, 4])]
    assert [(o.name, o.datatype, list(o.shape)) for o in meta.outputs] == [("y", "FP32", [-1, 4])]


async def test_config_is_completed(served):
    config = (await served.stub.ModelConfig(pb.ModelConfigRequest(name="add"))).config
    assert (config.name, config.max_batch_size, config.backend) == ("add", 64, "onnxruntime")
    assert [(i.name, list(i.dims)) for i in config.input] == [("a", [-1]), ("b", [-1])]
    assert [(o.name, list(o.dims)) for o in config.output] == [("sum", [-1]), ("difference", [-1])]


async def test_the_index_gives_the_reason_of_a_failure(served):
    rows = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    states = {(row.name, row.version): row.state for row in rows}
    assert states["triple", "1"] == states["triple", "2"] == "READY"
    assert states["broken", "1"] == "UNAVAILABLE"
    assert "Protobuf parsing failed" in next(row.reason for row in rows if row.name == "broken")
    ready = (await served.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
    assert {row.state for row in ready} == {"READY"}


async def test_infer_and_choice_of_version(served):
    x = floats([1, 2, 3, 4], [5, 6, 7, 8])
    response = await served.stub.ModelInfer(request("double", id="r-1", x=x))
    assert (response.model_name, response.model_version, response.id) == ("double", "1", "r-1")
    assert not response.parameters
    np.testing.assert_array_equal(output(response, "y"), 2 * x)
    newest = await served.stub.ModelInfer(request("triple", x=x))
    assert newest.model_version == "2"
    np.testing.assert_array_equal(output(newest, "y"), 30 * x)
    named = await served.stub.ModelInfer(request("triple", version="1", x=x))
    np.testing.assert_array_equal(output(named, "y"), 3 * x)


async def test_outputs_come_in_the_requested_order(served):
    a, b = floats([1, 2, 3]), floats([10, 20, 30])
    asked = request("add", a=a, b=b)
    for name in ("difference", "sum"):
        asked.outputs.add(name=name)
    response = await served.stub.ModelInfer(asked)
    assert [o.name for o in response.outputs] == ["difference", "sum"]
    np.testing.assert_array_equal(output(response, "difference"), a - b)
    del asked.outputs[1]
    assert [o.name for o in (await served.stub.ModelInfer(asked)).outputs] == ["difference"]


async def test_text_half_and_models_without_a_batch(served):
    words = np.array([[b"fish", "école".encode()], [b"", b"a\0b"]], object)
    assert output(await served.stub.ModelInfer(request("text", x=words)), "y").tolist() == words.tolist()
    half = np.array([[1, 2.5, -3, 65504]], np.float16)
    np.testing.assert_array_equal(output(await served.stub.ModelInfer(request("half", x=half)), "y"), half)
    x, shape = np.arange(6, dtype=np.float32), np.array([2, 3])
    response = await served.stub.ModelInfer(request("reshape", x=x, shape=shape))
    np.testing.assert_array_equal(output(response, "y"), x.reshape(2, 3))


async def test_typed_contents(served):
    asked = pb.ModelInferRequest(model_name="double")
    asked.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([1, 2, 3, 4])
    np.testing.assert_array_equal(output(await served.stub.ModelInfer(asked), "y"), floats([2, 4, 6, 8]))


async def test_classification(served):
    asked = request("triple", version="1", x=floats([1, 3, 2, 0], [0, 0, 9, 9]))
    asked.outputs.add(name="y").parameters["classification"].int64_param = 2
    response = await served.stub.ModelInfer(asked)
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 2])
    assert output(response, "y").tolist() == [[b"9.000000:1:bee", b"6.000000:2"], [b"27.000000:2", b"27.000000:3:cat"]]
    asked.outputs[0].parameters["classification"].int64_param = 100
    assert list((await served.stub.ModelInfer(asked)).outputs[0].shape) == [2, 4]


async def test_explain(served):
    asked = request("double", x=floats([1, 2, 3, 4], [1, 2, 3, 4]))
    asked.parameters["explain"].bool_param = True
    told = (await served.stub.ModelInfer(asked)).parameters
    assert told["replica"].string_param == "test/infer-0"
    assert told["batch_size"].int64_param == 2
    assert told["compute_us"].int64_param >= 0
    assert told["queue_us"].int64_param >= 0


async def test_parameters_that_are_accepted(served):
    asked = request("double", x=floats([1, 2, 3, 4]))
    asked.parameters["timeout"].int64_param = 5_000_000
    asked.parameters["priority"].uint64_param = 2**64 - 1
    asked.parameters["sequence_id"].string_param = "s"
    asked.parameters["sequence_start"].bool_param = True
    asked.parameters["triton_enable_empty_final_response"].bool_param = True
    asked.parameters["binary_data_output"].bool_param = True
    asked.parameters["my_own"].double_param = 0.5
    asked.inputs[0].parameters["binary_data_size"].int64_param = 16
    asked.outputs.add(name="y").parameters["binary_data"].bool_param = True
    response = await served.stub.ModelInfer(asked)
    assert not response.parameters


def changed(**changes) -> pb.ModelInferRequest:
    made = request("double", x=floats([1, 2, 3, 4]))
    made.MergeFrom(pb.ModelInferRequest(**changes))
    return made


def with_parameter(name: str, **value) -> pb.ModelInferRequest:
    return changed(parameters={name: pb.InferParameter(**value)})


def with_output_parameter(name: str, **value) -> pb.ModelInferRequest:
    wanted = pb.ModelInferRequest.InferRequestedOutputTensor(name="y", parameters={name: pb.InferParameter(**value)})
    return changed(outputs=[wanted])


def shaped(*dims: int, raw: bytes = b"\0" * 16, datatype: str = "FP32") -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="double", raw_input_contents=[raw])
    made.inputs.add(name="x", datatype=datatype, shape=dims)
    return made


def both() -> pb.ModelInferRequest:
    made = shaped(1, 4)
    made.inputs[0].contents.fp32_contents.extend([1] * 4)
    return made


def typed(field: str, values: list, **changes) -> pb.ModelInferRequest:
    made = shaped(1, 4, **changes)
    del made.raw_input_contents[:]
    getattr(made.inputs[0].contents, field).extend(values)
    return made


X = floats([1, 2, 3, 4])
ERRORS = {
    "unknown model": (request("nope", x=X), "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
    "unknown version": (
        request("double", version="7", x=X),
        "NOT_FOUND",
        "Request for unknown model: 'double' version 7 is not found",
    ),
    **{
        f"version {text!r}": (
            request("double", version=text, x=X),
            "INVALID_ARGUMENT",
            f"failed to get model version from specified version string '{text}'",
        )
        for text in ("abc", "-1", "0", "1.0", " 1", "99999999999999999999", "٣")
    },
    "unavailable model": (request("broken", x=X), "UNAVAILABLE", "Request for unknown model: 'broken' has no version"),
    "unavailable version": (
        request("broken", version="1", x=X),
        "UNAVAILABLE",
        "Request for unknown model: 'broken' version 1 is not ready (UNAVAILABLE: ONNX Runtime",
    ),
    "unknown input": (request("double", z=X), "INVALID_ARGUMENT", "'z' for model 'double': its inputs are 'x'"),
    "unknown input too": (request("double", x=X, z=X), "INVALID_ARGUMENT", "'z'"),
    "missing input": (request("add", a=X), "INVALID_ARGUMENT", "missing 'b'"),
    "no input": (request("double"), "INVALID_ARGUMENT", "expected 1 inputs but got 0 for"),
    "input twice": (
        changed(inputs=request("double", x=X).inputs, raw_input_contents=[b""]),
        "INVALID_ARGUMENT",
        "'x' for model 'double' is given more than once",
    ),
    "wrong datatype": (shaped(1, 4, datatype="FP64"), "INVALID_ARGUMENT", "expected datatype FP32, got 'FP64'"),
    "no such datatype": (shaped(1, 4, datatype="F32"), "INVALID_ARGUMENT", "got 'F32'"),
    "wrong dim": (shaped(1, 5), "INVALID_ARGUMENT", "expected [-1,4], got [1,5]"),
    "wrong rank": (shaped(4), "INVALID_ARGUMENT", "expected [-1,4], got [4]"),
    "negative dim": (shaped(-1, 4), "INVALID_ARGUMENT", "negative dimension"),
    "too short": (shaped(1, 4, raw=b"\0" * 15), "INVALID_ARGUMENT", "byte size mismatch: shape [1,4] of FP32 is 16 b"),
    "too long": (shaped(1, 4, raw=b"\0" * 17), "INVALID_ARGUMENT", "got 17"),
    "huge": (shaped(2**62, 4), "INVALID_ARGUMENT", "batch-size must be <= 64"),
    "raw and contents": (both(), "INVALID_ARGUMENT", "both contents and raw_input_contents"),
    "no data": (typed("fp32_contents", []), "INVALID_ARGUMENT", "'x' for model 'double' has no data"),
    "too many raw": (changed(raw_input_contents=[b""]), "INVALID_ARGUMENT", "expected 1 raw_input_contents"),
    "too few values": (typed("fp32_contents", [1, 2]), "INVALID_ARGUMENT", "has 4 elements, fp32_contents has 2"),
    "wrong contents": (typed("int_contents", [1] * 4), "INVALID_ARGUMENT", "FP32 belongs in fp32_contents"),
    "unknown output": (
        changed(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="q")]),
        "INVALID_ARGUMENT",
        "'q' for model 'double': its outputs are 'y'",
    ),
    "output twice": (
        changed(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="y")] * 2),
        "INVALID_ARGUMENT",
        "requested more than once",
    ),
    "batch over max": (
        request("double", x=np.zeros((65, 4), "f4")),
        "INVALID_ARGUMENT",
        "<= 64 and at least 1, got 65",
    ),
    "no rows": (shaped(0, 4, raw=b""), "INVALID_ARGUMENT", "at least 1, got 0"),
    "rows differ": (request("add", a=X, b=floats(*[[1] * 4] * 2)), "INVALID_ARGUMENT", "expected 1 rows"),
    "timeout is text": (with_parameter("timeout", string_param="1"), "INVALID_ARGUMENT", "'timeout' parameter"),
    "timeout is negative": (
        with_parameter("timeout", int64_param=-1),
        "INVALID_ARGUMENT",
        "expected 0 or more, got -1",
    ),
    "priority is text": (with_parameter("priority", string_param="1"), "INVALID_ARGUMENT", "'priority' parameter"),
    "sequence_start is a number": (with_parameter("sequence_start", int64_param=1), "INVALID_ARGUMENT", "bool_param"),
    "explain is a number": (with_parameter("explain", int64_param=1), "INVALID_ARGUMENT", "'explain' parameter"),
    "no value": (with_parameter("timeout"), "INVALID_ARGUMENT", "got nothing"),
    "reserved": (with_parameter("triton_final_response", bool_param=True), "INVALID_ARGUMENT", "reserved"),
    "classification is text": (
        with_output_parameter("classification", string_param="2"),
        "INVALID_ARGUMENT",
        "'classification' parameter",
    ),
    "classification 0": (with_output_parameter("classification", int64_param=0), "INVALID_ARGUMENT", "1 or more"),
    "shared memory": (
        with_output_parameter("shared_memory_region", string_param="r"),
        "UNIMPLEMENTED",
        "shared memory is not supported",
    ),
    "not text": (request("text", x=np.array([[b"ok", b"\xff"]], object)), "INVALID_ARGUMENT", "element 1 is not UTF-8"),
    "the model raises": (
        request("lookup", i=np.array([[7]])),
        "INTERNAL",
        "Failed to process the request(s) for model 'lookup': indices element out of data bounds",
    ),
    "the model raises too": (
        request("reshape", x=X[0], shape=np.array([3, 3])),
        "INTERNAL",
        "Failed to process the request(s) for model 'reshape': ",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
async def test_errors(served, case):
    asked, code, text = ERRORS[case]
    got = await refused(served.stub.ModelInfer(asked))
    assert got[0] == code
    assert text in got[1]
    assert "/onnxruntime" not in got[1]
    # And nothing has happened to those who do better.
    assert (await served.stub.ModelInfer(request("double", x=X))).outputs


async def test_errors_of_other_methods(served):
    stub = served.stub
    for method, message in [(stub.ModelMetadata, pb.ModelMetadataRequest), (stub.ModelConfig, pb.ModelConfigRequest)]:
        assert await refused(method(message(name="nope"))) == (
            "NOT_FOUND",
            "Request for unknown model: 'nope' is not found",
        )
        assert (await refused(method(message(name="double", version="3"))))[0] == "NOT_FOUND"
        assert (await refused(method(message(name="double", version="x"))))[0] == "INVALID_ARGUMENT"
    code, text = await refused(stub.ModelStatistics(pb.ModelStatisticsRequest(name="nope")))
    assert (code, text) == ("INVALID_ARGUMENT", "requested model 'nope' is not available")
    assert (await refused(stub.ModelReady(pb.ModelReadyRequest(name="double", version="x"))))[0] == "INVALID_ARGUMENT"
    code, _ = await refused(stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="r")))
    assert code == "UNIMPLEMENTED"


NOT_DONE = {
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(),
    "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(),
    "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}


@pytest.mark.parametrize("method", NOT_DONE)
async def test_unsupported_methods_name_the_alternative(served, method):
    code, text = await refused(getattr(served.stub, method)(NOT_DONE[method]))
    assert code == "UNIMPLEMENTED"
    assert text.startswith(f"{method} is not supported: ")


async def test_every_method_is_implemented(served):
    done = {"ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelInfer"}
    done |= {"ModelStreamInfer", "RepositoryIndex", "ModelStatistics", "RepositoryModelLoad", "RepositoryModelUnload"}
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert {method.name for method in service.methods} == done | NOT_DONE.keys()


async def test_statistics(served):
    await asyncio.gather(*(served.stub.ModelInfer(request("double", x=floats([1] * 4, [2] * 4))) for _ in range(5)))
    await refused(served.stub.ModelInfer(shaped(1, 5)))
    response = await served.stub.ModelStatistics(pb.ModelStatisticsRequest(name="double", version="1"))
    (stats,) = response.model_stats
    assert (stats.name, stats.version) == ("double", "1")
    assert stats.inference_count == 10
    assert 1 <= stats.execution_count <= 5
    assert stats.last_inference > 0
    timed = stats.inference_stats
    assert (timed.success.count, timed.fail.count, timed.queue.count, timed.compute_infer.count) == (5, 1, 5, 5)
    assert timed.success.ns > timed.compute_infer.ns > 0
    assert sum(batch.batch_size * batch.compute_infer.count for batch in stats.batch_stats) == 10
    everyone = (await served.stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
    assert [(s.name, s.version) for s in everyone if s.name == "triple"] == [("triple", "1"), ("triple", "2")]


async def test_many_callers_get_their_own_responses(served):
    async def call(n: int) -> None:
        rows = 1 + n % 5
        x = np.full((rows, 4), n, np.float32)
        np.testing.assert_array_equal(output(await served.stub.ModelInfer(request("double", x=x)), "y"), 2 * x)

    await asyncio.gather(*(call(n) for n in range(200)))


async def test_rows_of_different_lengths_are_not_mixed(served):
    async def call(n: int) -> None:
        a = np.full((1, 1 + n % 7), n, np.float32)
        np.testing.assert_array_equal(output(await served.stub.ModelInfer(request("add", a=a, b=a)), "sum"), a + a)

    await asyncio.gather(*(call(n) for n in range(100)))


async def test_zero_sized_rows(served):
    a = np.zeros((2, 0), np.float32)
    assert output(await served.stub.ModelInfer(request("add", a=a, b=a)), "sum").shape == (2, 0)


async def test_a_failing_request_does_not_fail_its_batch(served):
    async def call(n: int):
        asked = request("lookup", i=np.array([[99 if n % 10 == 0 else n % 3]]))
        try:
            return output(await served.stub.ModelInfer(asked), "y").tolist()
        except grpc.aio.AioRpcError as err:
            return err.code().name

    outcomes = await asyncio.gather(*(call(n) for n in range(60)))
    assert outcomes == ["INTERNAL" if n % 10 == 0 else [[10.0 * (1 + n % 3)]] for n in range(60)]


async def test_stream_keeps_the_order_and_survives_errors(served):
    async def asked():
        for n in range(100):
            yield request("nope" if n % 7 == 3 else "double", id=str(n), x=np.full((1, 4), n, np.float32))

    responses = [response async for response in served.stub.ModelStreamInfer(asked())]
    assert [response.infer_response.id for response in responses] == [str(n) for n in range(100)]
    for n, response in enumerate(responses):
        if n % 7 == 3:
            assert response.error_message == "Request for unknown model: 'nope' is not found"
            assert response.infer_response.parameters[ERROR_CODE_PARAMETER].int64_param == Code.NOT_FOUND
        else:
            assert not response.error_message
            np.testing.assert_array_equal(output(response.infer_response, "y"), np.full((1, 4), 2 * n))


async def test_the_real_model_gives_the_results_that_it_gives_alone(serve, models_folder: Repository):
    import onnxruntime

    models_folder.put("magika", onnx_files.MAGIKA.read_bytes())
    served = await serve(models_folder.root)
    assert (await served.stub.ServerReady(pb.ServerReadyRequest())).ready
    rows = np.random.default_rng(7).integers(0, 256, (12, 2048)).astype(np.int32)
    responses = await asyncio.gather(*(served.stub.ModelInfer(request("magika", bytes=row[None])) for row in rows))
    alone = onnxruntime.InferenceSession(str(onnx_files.MAGIKA))
    for row, response in zip(rows, responses, strict=True):
        (expected,) = alone.run(None, {"bytes": row[None]})
        # A batch is summed in another order than a row: the last bits may differ.
        np.testing.assert_allclose(output(response, "target_label"), expected, rtol=1e-4, atol=1e-6)


BUSY_CONFIG = """
max_batch_size: 1
dynamic_batching { default_queue_policy { max_queue_size: 2 } }
"""


async def test_overload_is_rejected_early_with_a_retry_time(serve, models_folder: Repository):
    models_folder.put("slow", onnx_files.slow(), config=BUSY_CONFIG)
    served = await serve(models_folder.root)

    calls = (served.stub.ModelInfer(request("slow", x=X)) for _ in range(50))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    # Two wait, and one more runs if it was dispatched before the last request arrived; others follow as these end.
    assert 0 < len(refusals) <= 48
    for refusal in refusals:
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "Exceeds maximum queue size of model 'slow'" in refusal.details()
        assert int(dict(refusal.trailing_metadata())["retry-after-ms"]) > 0
    assert (await served.stub.ModelInfer(request("slow", x=X))).outputs


async def test_a_cancelled_stream_leaves_no_requests_behind(served):
    sent = asyncio.Event()

    async def asked():
        for n in range(10):
            yield request("double", id=str(n), x=X)
        sent.set()
        await asyncio.Event().wait()

    call = served.stub.ModelStreamInfer(asked())
    first = await call.read()
    assert first.infer_response.id == "0"
    await sent.wait()
    call.cancel()
    version = served.models.find("double", "")
    await until(lambda: version._users == 0, "the end of its calls")
    assert (await served.stub.ModelInfer(request("double", x=X))).outputs


async def test_a_stream_is_read_no_faster_than_its_responses_are_sent(served):
    sent = 0

    async def asked():
        nonlocal sent
        for n in range(1000):
            sent += 1
            yield request("double", id=str(n), x=np.ones((8, 4), np.float32))

    class Infer:
        running = most = 0

        async def __call__(self, asked: pb.ModelInferRequest, part: object, raw: list[Any]) -> pb.ModelInferResponse:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0)
            self.running -= 1
            return await served.core.infer(asked)

    infer = Infer()
    responses = model_stream_infer.stream_responses(asked(), infer)

    def id_of(response: MessageParts) -> str:
        return pb.ModelStreamInferResponse.FromString(b"".join(response.parts)).infer_response.id

    assert id_of(await anext(responses)) == "0"
    await asyncio.sleep(0)
    assert sent <= model_stream_infer.AHEAD + 1
    rest = [id_of(response) async for response in responses]
    assert rest == [str(n) for n in range(1, 1000)]
    assert infer.most <= model_stream_infer.AHEAD


async def test_a_tenant_leaves_streams_to_the_others(serve, models_folder: Repository, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("services.infer.rpc._STREAMS", 6)
    models_folder.put("double", onnx_files.scale(2))
    served = await serve(models_folder.root)

    end = asyncio.Event()

    async def asked():
        yield request("double", x=X)
        await end.wait()

    async def opened(tenant: str):
        call = served.stub.ModelStreamInfer(asked(), metadata=[(TENANT_HEADER, tenant)])
        assert (await call.read()).infer_response.outputs
        return call

    calls = [await opened("acme") for _ in range(4)]
    # It sends nothing: of a stream that has ended, gRPC's client may report the failed write.
    with pytest.raises(grpc.aio.AioRpcError, match="4 streams of this tenant are open, and the 2 places left are for"):
        await served.stub.ModelStreamInfer(metadata=[(TENANT_HEADER, "acme")]).read()
    calls.append(await opened("globex"))
    end.set()
    assert [await call.code() for call in calls] == [grpc.StatusCode.OK] * 5
    assert [await (await opened("acme")).code() for _ in range(5)] == [grpc.StatusCode.OK] * 5
