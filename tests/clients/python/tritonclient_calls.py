"""Runs in the environment of an unmodified tritonclient: makes its calls, prints what came back as one JSON document.

    python tritonclient_calls.py HOST:PORT IDENTITY.onnx     (models: see tests/clients/conftest.py)

It is a process of its own because tritonclient brings its own `package inference`, which cannot live beside ours.
"""

from __future__ import annotations

import asyncio
import json
import queue
import struct
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

MODEL = "double"
FINAL = "triton_final_response"


def tensor(rows: int = 1, start: float = 1, *, module: Any = triton) -> Any:
    array = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + np.float32(start)
    given = module.InferInput("x", array.shape, "FP32")
    given.set_data_from_numpy(array)
    return given


def times(count: int) -> Any:
    given = triton.InferInput("times", [1], "INT32")
    given.set_data_from_numpy(np.array([count], np.int32))
    return given


def failure(err: InferenceServerException) -> list[str]:
    return [str(err.status()), str(err.message())]


def outcome(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as err:
        return failure(err)
    return ["OK", ""]


async def aio_outcome(call: Any) -> list[str]:
    try:
        await call
    except InferenceServerException as err:
        return failure(err)
    return ["OK", ""]


def y(result: Any) -> Any:
    return result.as_numpy("y").tolist()


def texts(result: Any) -> list[list[str]]:
    return [[text.decode() for text in row] for row in result.as_numpy("y")]


def sync(client: triton.InferenceServerClient) -> dict[str, Any]:
    classes = [triton.InferRequestedOutput("y", class_count=3)]
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready(MODEL),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata(MODEL, as_json=True),
        "config": client.get_model_config(MODEL, as_json=True),
        "index": client.get_model_repository_index(as_json=True),
        "infer": y(client.infer(MODEL, [tensor()], headers={"x-shoal-tenant": "a"})),
        "ensemble": y(client.infer("chain", [tensor()])),
        "ensemble, metadata": client.get_model_metadata("chain", as_json=True),
        "classification": texts(client.infer("classes", [tensor()], outputs=classes)),
        "compressed": {
            name: client.infer(MODEL, [tensor(64)], compression_algorithm=name).as_numpy("y").shape
            for name in ("gzip", "deflate")
        },
        "parameters": y(client.infer(MODEL, [tensor()], priority=1, timeout=20_000_000, parameters={"mine": "x"})),
        "image": client.infer("decode", [image(bitmap())]).as_numpy("image").tolist(),
        "no image": outcome(lambda: client.infer("decode", [image(b"nothing")])),
        "unknown": outcome(lambda: client.infer("nope", [tensor()])),
        "timeout": outcome(lambda: client.infer("patient", [tensor()], client_timeout=0.2)),
        "stream": streamed(
            client, 3, lambda: [client.async_stream_infer(m, [tensor()]) for m in (MODEL, "nope", MODEL)]
        ),
        "decoupled": streamed(client, 3, lambda: client.async_stream_infer("repeat", [times(3)])),
        "decoupled, final": streamed(
            client, 4, lambda: client.async_stream_infer("repeat", [times(3)], enable_empty_final_response=True)
        ),
    }


def image(data: bytes) -> Any:
    given = triton.InferInput("image", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([[data]], object))
    return given


def bitmap() -> bytes:
    """A BMP, 2 high and 1 wide: red above blue. Its rows go up, and its pixels are BGR."""
    head = struct.pack("<2sIHHI", b"BM", 62, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 1, 2, 1, 24, 0, 8, 0, 0, 0, 0)
    return head + bytes([255, 0, 0, 0, 0, 0, 255, 0])


def streamed(client: triton.InferenceServerClient, count: int, send: Callable[[], Any]) -> list[Any]:
    """The first `count` answers on a stream of its own."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    send()
    got = [answers.get(timeout=30) for _ in range(count)]
    client.stop_stream()
    return [plain(result, error) for result, error in got]


def plain(result: Any, error: Any) -> Any:
    if error is not None:
        return error.message()
    response = result.get_response()
    if not response.outputs:
        return "final" if response.parameters[FINAL].bool_param else "empty"
    name = response.outputs[0].name
    return result.as_numpy(name)[0].tolist()


def callbacks(client: triton.InferenceServerClient) -> list[float]:
    """Eight async_infer at once; their answers in the order they were asked."""
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for n in range(8):
        client.async_infer(MODEL, [tensor(start=n)], lambda result, error, n=n: answers.put((n, result, error)))
    got = sorted((answers.get(timeout=30) for _ in range(8)), key=lambda entry: entry[0])
    assert all(error is None for _, _, error in got), got
    return [result.as_numpy("y")[0, 0].item() for _, result, _ in got]


async def aio(url: str) -> dict[str, Any]:
    classes = [triton_aio.InferRequestedOutput("y", class_count=3)]
    async with triton_aio.InferenceServerClient(url) as client:
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model ready": await client.is_model_ready(MODEL),
            "server": await client.get_server_metadata(as_json=True),
            "metadata": await client.get_model_metadata(MODEL, as_json=True),
            "config": await client.get_model_config(MODEL, as_json=True),
            "index": await client.get_model_repository_index(as_json=True),
            "infer": y(await client.infer(MODEL, [tensor()])),
            "classification": texts(await client.infer("classes", [tensor()], outputs=classes)),
            "compressed": {
                name: (await client.infer(MODEL, [tensor(64)], compression_algorithm=name)).as_numpy("y").shape
                for name in ("gzip", "deflate")
            },
            "parameters": y(await client.infer(MODEL, [tensor()], priority=1, timeout=20_000_000)),
            "unknown": await aio_outcome(client.infer("nope", [tensor()])),
            "timeout": await aio_outcome(client.infer("patient", [tensor()], client_timeout=0.2)),
            "stream": await aio_streamed(
                client, [{"model_name": m, "inputs": [tensor()]} for m in (MODEL, "nope", MODEL)]
            ),
            "decoupled": await aio_streamed(client, [{"model_name": "repeat", "inputs": [times(3)]}]),
        }


async def aio_streamed(client: triton_aio.InferenceServerClient, asked: list[dict[str, Any]]) -> list[Any]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for one in asked:
            yield one

    return [plain(result, error) async for result, error in client.stream_infer(requests())]


def loading(client: triton.InferenceServerClient) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    client.unload_model("classes")
    seen["unloaded ready"] = client.is_model_ready("classes")
    seen["unloaded infer"] = outcome(lambda: client.infer("classes", [tensor()]))
    client.load_model("double")
    seen["loaded"] = y(client.infer("double", [tensor()]))
    with open(sys.argv[2], "rb") as file:
        files = {"file:1/model.onnx": file.read()}
    client.load_model("double", config=json.dumps({"backend": "onnxruntime", "max_batch_size": 3}), files=files)
    seen["overridden batch size"] = client.get_model_config("double").config.max_batch_size
    seen["overridden"] = y(client.infer("double", [tensor()]))
    client.load_model("double")
    seen["loaded again"] = y(client.infer("double", [tensor()]))
    client.load_model("classes")
    seen["unknown"] = outcome(lambda: client.load_model("nope"))
    return seen


def main() -> None:
    url = sys.argv[1]
    client = triton.InferenceServerClient(url)
    report = {
        "sync": sync(client),
        "aio": asyncio.run(aio(url)),
        "callbacks": callbacks(client),
        "statistics": client.get_inference_statistics(MODEL, as_json=True),
        "loading": loading(client),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
