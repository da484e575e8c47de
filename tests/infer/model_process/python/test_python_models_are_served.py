"""Model processes of a served instance."""

from __future__ import annotations

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2_grpc
from tests.breakable import until
from tests.infer.conftest import floats, output, request
from tests.infer.model_process.python.test_python_model_lifecycle import PID, is_alive
from tests.infer.test_infer_process import Infer

SMALL = PID.replace("200 << 20", "1")


async def test_a_python_model_is_served_and_its_process_ends_with_the_server(repo, python, tmp_path):
    repo.python("m", SMALL)
    repo.python("stream", SMALL.replace("return {", "yield {"))
    with Infer(python, tmp_path / "log", repository=str(repo.root)) as infer:
        await infer.until_serving()
        async with connect(infer.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            pids = [int(output(await stub.ModelInfer(request("m", x=floats([1]))), "pid")[0, 0]) for _ in range(3)]
            async for response in stub.ModelStreamInfer(iter([request("stream", x=floats([1]))])):
                assert not response.error_message
                pids.append(int(output(response.infer_response, "pid")[0, 0]))
        assert len(set(pids)) == 2
        assert infer.pid not in pids
        infer.kill()
        await until(lambda: not any(map(is_alive, pids)))
