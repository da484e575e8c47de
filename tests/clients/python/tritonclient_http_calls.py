"""Runs in the environment of an unmodified tritonclient: makes its calls over HTTP, prints what came back as JSON.

python tritonclient_http_calls.py HOST:PORT IDENTITY.onnx     (models: see tests/clients/conftest.py)
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

MODEL = "double"


def tensor(rows: int = 1, start: float = 1, *, module: Any = triton, binary: bool = True) -> Any:
    array = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + np.float32(start)
    given = module.InferInput("x", list(array.shape), "FP32")
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def outcome(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except InferenceServerException as err:
        return [str(err.status()), str(err.message())]
    return ["OK", ""]


async def aio_outcome(call: Any) -> list[str]:
    try:
        await call
    except InferenceServerException as err:
        return [str(err.status()), str(err.message())]
    return ["OK", ""]


def y(result: Any) -> Any:
    return result.as_numpy("y").tolist()


def classes(result: Any) -> Any:
    return [[text.decode() if isinstance(text, bytes) else text for text in row] for row in result.as_numpy("y")]


def forms(module: Any) -> dict[str, dict[str, Any]]:
    """Forms of inputs and outputs."""
    return {
        f"{given} to {wanted}": {
            "inputs": [tensor(module=module, binary=given == "binary")],
            "outputs": [module.InferRequestedOutput("y", binary_data=wanted == "binary")],
        }
        for given in ("binary", "json")
        for wanted in ("binary", "json")
    } | {"all outputs": {"inputs": [tensor(module=module)], "outputs": None}}


def sync(client: triton.InferenceServerClient, identity: bytes) -> dict[str, Any]:
    best = [triton.InferRequestedOutput("y", binary_data=False, class_count=3)]
    zipped = [("gzip", "gzip"), ("deflate", "deflate"), ("gzip", "deflate"), (None, "gzip")]
    rows = tensor(64)
    found = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": client.is_model_ready(MODEL),
        "version ready": client.is_model_ready(MODEL, "1"),
        "nope ready": client.is_model_ready("nope"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata(MODEL),
        "config": client.get_model_config(MODEL),
        "index": client.get_model_repository_index(),
        "infer": {name: y(client.infer(MODEL, **form)) for name, form in forms(triton).items()},
        "tenant": y(client.infer(MODEL, [tensor()], headers={"x-shoal-tenant": "a"}, request_id="7")),
        "parameters": y(client.infer(MODEL, [tensor()], timeout=10_000_000, priority=1, parameters={"a": 1, "b": "c"})),
        "version": y(client.infer(MODEL, [tensor()], model_version="1")),
        "ensemble": y(client.infer("chain", [tensor()])),
        "classification": classes(client.infer("classes", [tensor()], outputs=best)),
        "compressed": [
            list(
                client.infer(MODEL, [rows], request_compression_algorithm=sent, response_compression_algorithm=wanted)
                .as_numpy("y")
                .shape
            )
            for sent, wanted in zipped
        ],
        "unknown": outcome(lambda: client.infer("nope", [tensor()])),
        "wrong": outcome(lambda: client.infer(MODEL, [])),
        "decoupled": outcome(lambda: client.infer("repeat", [tensor()])),
        "statistics": client.get_inference_statistics(MODEL),
        "all statistics": client.get_inference_statistics(),
    }
    large = np.arange(4_000_000, dtype=np.float32).reshape(-1, 4)
    given = triton.InferInput("x", list(large.shape), "FP32")
    given.set_data_from_numpy(large)
    found["large"] = bool((client.infer("wide", [given]).as_numpy("y") == large * 2).all())
    calls = [client.async_infer(MODEL, [tensor(start=n)]) for n in range(8)]
    found["async"] = [float(call.get_result().as_numpy("y")[0][0]) for call in calls]
    client.unload_model(MODEL)
    found["unloaded ready"] = client.is_model_ready(MODEL)
    client.load_model(MODEL)
    config = json.dumps({"backend": "onnxruntime", "max_batch_size": 3})
    client.load_model(MODEL, config=config, files={"file:1/model.onnx": identity})
    found["overridden"] = [client.get_model_config(MODEL)["max_batch_size"], y(client.infer(MODEL, [tensor()]))]
    client.load_model(MODEL)
    found["loaded again"] = y(client.infer(MODEL, [tensor()]))
    found["load nope"] = outcome(lambda: client.load_model("nope"))
    return found


async def aio(address: str) -> dict[str, Any]:
    async with triton_aio.InferenceServerClient(address) as client:
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model ready": await client.is_model_ready(MODEL),
            "server": await client.get_server_metadata(),
            "metadata": await client.get_model_metadata(MODEL),
            "infer": {name: y(await client.infer(MODEL, **form)) for name, form in forms(triton_aio).items()},
            "many": [
                y(answer)[0][0]
                for answer in await asyncio.gather(
                    *(client.infer(MODEL, [tensor(start=n, module=triton_aio)]) for n in range(64))
                )
            ],
            "unknown": await aio_outcome(client.infer("nope", [tensor()])),
        }


def main(address: str, identity: str) -> None:
    with open(identity, "rb") as file, triton.InferenceServerClient(address, concurrency=8) as client:
        seen = {"sync": sync(client, file.read()), "aio": asyncio.run(aio(address))}
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
