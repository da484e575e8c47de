"""Runs in the environment of an unmodified tritonclient: makes its calls, prints what came back as one JSON document.

    python tritonclient_calls.py HOST:PORT     (models: `double`, x [N,4] FP32 -> y = 2x; `labels` is not needed)

It is a process of its own because tritonclient brings its own `package inference`, which cannot live beside ours.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

MODEL = "double"


def tensor(rows: int = 2, *, name: str = "x", dtype: str = "FP32", dims: int = 4) -> triton.InferInput:
    kinds = {"FP32": np.float32, "INT64": np.int64, "FP64": np.float64}
    array = np.arange(rows * dims, dtype=kinds[dtype]).reshape(rows, dims)
    given = triton.InferInput(name, array.shape, dtype)
    given.set_data_from_numpy(array)
    return given


def outcome(call: Callable[[], Any]) -> list[str]:
    """[status, message] of a call."""
    try:
        call()
    except InferenceServerException as err:
        return [str(err.status()), str(err.message())]
    return ["OK", ""]


def raw(stub: Any, **changes: Any) -> Callable[[], Any]:
    """A ModelInfer of double built by hand, for what the client itself would not send."""
    request = pb.ModelInferRequest(model_name=MODEL)
    given = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.ones(4, np.float32).tobytes())
    if changes.get("both"):
        given.contents.fp32_contents.extend([1, 1, 1, 1])
    if changes.get("no_data"):
        del request.raw_input_contents[:]
    if "size" in changes:
        request.raw_input_contents[0] = b"\0" * changes["size"]
    if "parameter" in changes:
        request.parameters[changes["parameter"]].string_param = "x"
    if changes.get("twice"):
        request.inputs.add().CopyFrom(given)
        request.raw_input_contents.append(request.raw_input_contents[0])

    def call() -> None:
        try:
            stub.ModelInfer(request, timeout=20)
        except Exception as err:
            raise InferenceServerException(err.details(), f"StatusCode.{err.code().name}") from err

    return call


def errors(client: triton.InferenceServerClient) -> dict[str, list[str]]:
    """The error table: what each mistake is answered with."""
    infer, stub = client.infer, client._client_stub
    odd = triton.InferRequestedOutput("nope")
    return {
        "unknown model": outcome(lambda: infer("nope", [tensor()])),
        "unknown version": outcome(lambda: infer(MODEL, [tensor()], model_version="7")),
        "version not a number": outcome(lambda: infer(MODEL, [tensor()], model_version="abc")),
        "unknown input": outcome(lambda: infer(MODEL, [tensor(name="z")])),
        "missing input": outcome(lambda: infer(MODEL, [])),
        "wrong dtype": outcome(lambda: infer(MODEL, [tensor(dtype="FP64")])),
        "wrong shape": outcome(lambda: infer(MODEL, [tensor(dims=5)])),
        "byte size mismatch": outcome(raw(stub, size=15)),
        "raw and contents": outcome(raw(stub, both=True)),
        "no data": outcome(raw(stub, no_data=True)),
        "input given twice": outcome(raw(stub, twice=True)),
        "unknown output": outcome(lambda: infer(MODEL, [tensor()], outputs=[odd])),
        "batch over max": outcome(lambda: infer(MODEL, [tensor(rows=1000)])),
        "wrong parameter type": outcome(raw(stub, parameter="timeout")),
        "reserved parameter": outcome(raw(stub, parameter="triton_secret")),
        "metadata of unknown": outcome(lambda: client.get_model_metadata("nope")),
        "config of unknown": outcome(lambda: client.get_model_config("nope")),
        "statistics of unknown": outcome(lambda: client.get_inference_statistics("nope")),
        "load": outcome(lambda: client.load_model(MODEL)),
        "unload": outcome(lambda: client.unload_model(MODEL)),
        "shared memory": outcome(lambda: client.get_system_shared_memory_status()),
    }


def callbacks(client: triton.InferenceServerClient) -> list[list[float]]:
    """Eight async_infer at once; their answers in the order they were asked."""
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for n in range(8):
        given = triton.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(np.full((1, 4), n, np.float32))
        client.async_infer(MODEL, [given], lambda result, error, n=n: answers.put((n, result, error)))
    got = sorted((answers.get(timeout=20) for _ in range(8)), key=lambda entry: entry[0])
    assert all(error is None for _, _, error in got), got
    return [result.as_numpy("y")[0].tolist() for _, result, _ in got]


def stream(client: triton.InferenceServerClient) -> list[Any]:
    """Three requests on one stream, the second one wrong."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for name in ("x", "z", "x"):
        client.async_stream_infer(MODEL, [tensor(1, name=name)])
    got = [answers.get(timeout=20) for _ in range(3)]
    client.stop_stream()
    return ["error" if error else result.as_numpy("y")[0].tolist() for result, error in got]


async def awaited(url: str) -> list[list[float]]:
    """The asyncio client, 16 calls at once."""
    async with triton_aio.InferenceServerClient(url) as client:
        results = await asyncio.gather(*(client.infer(MODEL, [tensor(1)]) for _ in range(16)))
        return [result.as_numpy("y")[0].tolist() for result in results]


def main(url: str) -> None:
    client = triton.InferenceServerClient(url)
    big = triton.InferInput("x", [64, 4], "FP32")
    big.set_data_from_numpy(np.ones((64, 4), np.float32))
    classes = triton.InferRequestedOutput("y", class_count=2)
    report = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready(MODEL),
        "unknown model ready": client.is_model_ready("nope"),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata(MODEL, as_json=True),
        "config": client.get_model_config(MODEL, as_json=True)["config"],
        "index": client.get_model_repository_index(as_json=True),
        "infer": client.infer(MODEL, [tensor()], request_id="r1").as_numpy("y").tolist(),
        "infer id": client.infer(MODEL, [tensor()], request_id="r1").get_response().id,
        "gzip": client.infer(MODEL, [big], compression_algorithm="gzip").as_numpy("y").shape,
        "headers": client.infer(MODEL, [tensor()], headers={"x-any": "thing"}).as_numpy("y").tolist(),
        "priority": client.infer(MODEL, [tensor()], priority=1, timeout=5_000_000).as_numpy("y").tolist(),
        "classification": [
            [c.decode() for c in r] for r in client.infer(MODEL, [tensor(1)], outputs=[classes]).as_numpy("y")
        ],
        "async": callbacks(client),
        "stream": stream(client),
        "aio": asyncio.run(awaited(url)),
        "errors": errors(client),
        "statistics": client.get_inference_statistics(MODEL, as_json=True),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
