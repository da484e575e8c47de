"""Python models over time: loaded, replaced, unloaded, and what is left when the server dies."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc
import numpy as np
import pytest

from mesh.rpc.channel import connect
from services.infer.sources import repository
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc
from tests.breakable import until
from tests.infer import onnx_files
from tests.infer.conftest import floats, output, request
from tests.infer.test_infer_process import Infer

PID = """
    import os, time
    import numpy as np
    class Model:
        inputs = {"x": ("FP32", [-1, 1])}
        outputs = {"pid": ("INT64", [-1, 1])}
        max_batch_size = 8
        def load(self, folder, config):
            self.held = np.ones(200 << 20, np.uint8)
        def predict(self, batch):
            while batch["x"][0, 0] == 13:
                pass
            return {"pid": np.full(batch["x"].shape, os.getpid(), np.int64)}
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # The latter when it goes while its file is read.
        return False


async def pid_of(stub, model: str = "m") -> int:
    return int(output(await stub.ModelInfer(request(model, x=floats([1]))), "pid")[0, 0])


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_unloading_ends_the_process(repo, serve):
    repo.python("m", PID)
    serving = await serve()
    pid = await pid_of(serving.stub)
    assert pid != os.getpid()
    assert resident_bytes(pid) > 200 << 20
    serving.models.want([])
    await until(lambda: not is_alive(pid))


async def test_a_new_version_replaces_the_old_one_without_a_failed_request(repo, serve):
    repo.python("m", PID)
    serving = await serve()
    before = await pid_of(serving.stub)
    seen: list[int] = []

    async def ask() -> None:
        while not seen or seen[-1] == before:
            seen.append(await pid_of(serving.stub))

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    repo.python("m", PID, version=2)
    serving.models.want(repository.scan(repo.root))
    await asyncio.gather(*asking)
    await until(lambda: not is_alive(before))
    assert await pid_of(serving.stub) in seen


async def test_a_hanging_model_is_unloaded_once_no_caller_waits(repo, serve, monkeypatch):
    monkeypatch.setattr("services.infer.model_process.session._ABANDONED_S", 0.5)
    repo.python("m", PID)
    serving = await serve()
    pid = await pid_of(serving.stub)
    with pytest.raises(grpc.aio.AioRpcError) as err:
        await serving.stub.ModelInfer(request("m", x=floats([13])), timeout=0.3)
    assert err.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    serving.models.want([])
    await until(lambda: not is_alive(pid))


async def test_an_endless_load_ends_when_the_model_is_not_desired_any_more(repo, serve, tmp_path):
    repo.python("good", PID)
    serving = await serve()
    never = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    repo.python("never", never)
    serving.models.want(repository.scan(repo.root))
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert await pid_of(serving.stub, "good")
    await serving.models.__aexit__(None, None, None)
    await until(lambda: not is_alive(pid))
    await serving.models.__aenter__()


async def test_an_isolated_onnx_model(repo, serve):
    apart = 'parameters { key: "isolation" value { string_value: "process" } }'
    repo.put("apart", onnx_files.scale(), config=apart)
    repo.put("here", onnx_files.scale())
    serving = await serve()
    for name in ("apart", "here"):
        got = output(await serving.stub.ModelInfer(request(name, x=floats([1, 2, 3, 4]))), "y")
        assert got.tolist() == [[2, 4, 6, 8]]
    scheduler = serving.models.find("apart", "").loaded
    assert scheduler.session.instances[0].running().pid != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_model_processes_end_with_the_server(repo, python, tmp_path, number):
    repo.python("m", PID.replace("200 << 20", "1"))
    repo.python("stream", PID.replace("return {", "yield {").replace("200 << 20", "1"))
    with Infer(python, tmp_path / "log", repository=str(repo.root)) as infer:
        await infer.until_serving()
        async with connect(infer.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            pids = [await pid_of(stub)]
            async for response in stub.ModelStreamInfer(iter([request("stream", x=floats([1]))])):
                pids.append(int(output(response.infer_response, "pid")[0, 0]))
        assert len(set(pids)) == 2
        os.kill(infer.pid, number)
        await until(lambda: not any(map(is_alive, pids)))


async def test_bytes_booleans_and_halves_in_tritons_interface(repo, serve):
    repo.python(
        "m",
        """
        import numpy as np
        import triton_python_backend_utils as pb_utils
        class TritonPythonModel:
            def initialize(self, args):
                pb_utils.Logger.log_info(f"loaded {args['model_name']} {args['model_version']}")
            def execute(self, requests):
                responses = []
                for request in requests:
                    s, b, h = (pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in ("s", "b", "h"))
                    assert s.dtype == np.object_ and type(s.flat[0]) is bytes
                    assert pb_utils.get_input_tensor_by_name(request, "none") is None
                    about = f"{request.request_id()} {request.parameters()} {request.timeout()}"
                    packed = pb_utils.serialize_byte_tensor(s)
                    assert pb_utils.deserialize_bytes_tensor(packed).tolist() == s.flatten().tolist()
                    again = pb_utils.Tensor.from_dlpack("h", pb_utils.Tensor("h", h))
                    responses.append(pb_utils.InferenceResponse([
                        pb_utils.Tensor("s", np.array([[e.decode().upper() for e in row] for row in s], np.object_)),
                        pb_utils.Tensor("b", ~b), pb_utils.Tensor("h", again.as_numpy() / 2),
                        pb_utils.Tensor("about", np.array([[about.encode()]], np.object_))]))
                return responses
        """,
        """backend: "python" max_batch_size: 4
        input [ { name: "s" data_type: TYPE_STRING dims: [ 2 ] }, { name: "b" data_type: TYPE_BOOL dims: [ 1 ] },
                { name: "h" data_type: TYPE_FP16 dims: [ 1 ] } ]
        output [ { name: "s" data_type: TYPE_STRING dims: [ 2 ] }, { name: "b" data_type: TYPE_BOOL dims: [ 1 ] },
                 { name: "h" data_type: TYPE_FP16 dims: [ 1 ] },
                 { name: "about" data_type: TYPE_STRING dims: [ 1 ] } ]""",
    )
    serving = await serve()
    asked = request(
        "m",
        id="seven",
        s=np.array([[b"a", "é".encode()]], object),
        b=np.array([[True]]),
        h=np.array([[3]], np.float16),
    )
    asked.parameters["mine"].string_param = "x"
    asked.parameters["timeout"].int64_param = 9_000_000
    response = await serving.stub.ModelInfer(asked)
    assert output(response, "s").tolist() == [[b"A", "É".encode()]]
    assert output(response, "b").tolist() == [[False]]
    assert output(response, "h").tolist() == [[1.5]]
    assert output(response, "about").tolist() == [[b'seven {"mine":"x"} 9000000']]


GIVING = "return [pb_utils.InferenceResponse([pb_utils.Tensor('y', {})])]"


WRONG_RESPONSES = [
    ("return []", "execute returned 0 responses for 1 requests"),
    ("return None", "execute sent no response to this request"),
    ("return [None]", "execute sent no response to this request"),
    ("return [5]", "execute returned a int in its list"),
    ("return 5", "execute returned a int"),
    ("return [pb_utils.InferenceResponse([])]", "the response has no output 'y'"),
    (GIVING.format("np.zeros((1, 9), np.float32)"), "shape [1,9], expected"),
    (GIVING.format("np.zeros((3, 4), np.float32)"), "shape [3,4] for 1 rows"),
    (GIVING.format("np.zeros((1, 4))"), "expected FP32"),
    (GIVING.format("[1]"), "expected a NumPy array"),
    ("raise pb_utils.TritonModelException('mine')", "TritonModelException: mine"),
    ("requests[0].set_release_flags(2)", "set_release_flags) is not supported"),
    ("pb_utils.MetricFamily()", "custom metrics from a Python model are not supported by Shoal"),
    ("requests[0].get_response_sender().send(flags=1)", "execute sent no response"),
]  # fmt: skip


async def test_errors_of_execute_are_reported(repo, serve):
    executes = "".join(
        f"""
            if number == {number}:
                {execute}"""
        for number, (execute, _) in enumerate(WRONG_RESPONSES)
    )
    source = f"""
    import numpy as np
    import triton_python_backend_utils as pb_utils
    class TritonPythonModel:
        def execute(self, requests):
            number = pb_utils.get_input_tensor_by_name(requests[0], "x").as_numpy()[0, 0]{executes}
    """
    config = """backend: "python" max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 4 ] }"""
    repo.python("m", source, config)
    serving = await serve()
    for number, (execute, told) in enumerate(WRONG_RESPONSES):
        with pytest.raises(ShoalError) as err:
            await serving.core.infer(request("m", x=floats([number, 0, 0, 0])))
        assert told in err.value.message, execute


async def test_a_response_sender_may_replace_the_return_value(repo, serve):
    repo.python(
        "m",
        """
        import threading
        import triton_python_backend_utils as pb_utils
        class TritonPythonModel:
            def execute(self, requests):
                for request in requests:
                    threading.Timer(0.05, self.respond, (request, request.get_response_sender())).start()
            def respond(self, request, sender):
                y = pb_utils.Tensor("y", request.inputs()[0].as_numpy() + 1)
                sender.send(pb_utils.InferenceResponse([y]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        """,
        """backend: "python" max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 4 ] }""",
    )
    serving = await serve()
    assert output(await serving.stub.ModelInfer(request("m", x=floats([1, 2, 3, 4]))), "y").tolist() == [[2, 3, 4, 5]]


async def test_contradictory_settings_are_named(repo, serve):
    source = "class Model:\n  def predict(self, batch):\n    yield {'y': batch['x']}"
    tensors = (
        """input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } output { name: "y" data_type: TYPE_FP32 dims: [ 4 ] }"""
    )
    repo.python("cached", source, 'backend: "python" response_cache { enable: true }' + tensors)
    warm = 'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 zero_data: true } } }'
    repo.python("warm", source, 'backend: "python"' + warm + tensors)
    repo.python(
        "env",
        source,
        'backend: "python" parameters { key: "EXECUTION_ENV_PATH" value { string_value: "e" } }' + tensors,
    )
    repo.put("onnx", onnx_files.scale(), config="model_transaction_policy { decoupled: true }")
    timed = 'parameters { key: "execution_timeout_ms" value { string_value: "5" } }'
    repo.put("timed", onnx_files.scale(), config=timed)
    repo.put("odd", onnx_files.scale(), config='parameters { key: "isolation" value { string_value: "jail" } }')
    serving = await serve()
    reasons = {row.name: row.reason for row in (await serving.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models}
    assert "response_cache of a decoupled model is not supported" in reasons["cached"]
    assert "model_warmup of a decoupled model is not supported" in reasons["warm"]
    assert "execution_timeout_ms needs parameter isolation 'process'" in reasons["timed"]
    assert "parameter isolation 'jail': expected" in reasons["odd"]
    assert "EXECUTION_ENV_PATH is not supported" in reasons["env"]
    assert "model_transaction_policy.decoupled is not supported" in reasons["onnx"]
