"""Loads over REST: files in base64, read in slices, so that a large one delays no other call."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest

from mesh.rest.json_text import JSON_BYTES
from mesh.rpc.heavy_work import Steps
from services.infer.rest import load_request
from services.infer.rest.load_request import LOAD_BYTES, MAX_QUOTES
from shoal.errors import InvalidArgument
from tests.infer import onnx_files
from tests.infer.conftest import Repository, Serving
from tests.mesh.http1.raw import RawClient

LOAD = "/v2/repository/models/double/load"
INFER = "/v2/models/double/infer"
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
LONG = 1 << 17


def driven(steps: Steps[Any]) -> tuple[Any, int]:
    """Return the result, and the number of steps."""
    count = 0
    while True:
        try:
            work = next(steps)
        except StopIteration as end:
            return end.value, count
        count += 1
        if work is not None:
            work()


def test_long_texts_are_cut_out_and_files_decoded_in_slices() -> None:
    files = [os.urandom(size) for size in (5 << 20, LONG, 3)]
    escaped = base64.b64encode(bytes(LONG)).decode().replace("A", "\\u0041", 1)
    long_name = "n" * LONG
    parts = [f'"file:{number}": "{base64.b64encode(data).decode()}"' for number, data in enumerate(files)]
    text = f'{{"parameters": {{{", ".join(parts)}, "file:e": "{escaped}", "c": "\\\\\\"", "{long_name}": 1}}}}'
    (short, texts), _ = driven(load_request._cut(text.encode()))
    given, whole = json.loads(short)["parameters"], json.loads(text)["parameters"]
    assert [len(cut) for cut in texts.values()] == [len(base64.b64encode(data)) for data in files[:2]] + [LONG]
    assert long_name in {bytes(texts[name]).decode() for name in given if name in texts}
    for number, data in enumerate(files[:2]):
        found, steps = driven(load_request._decoded(texts[given[f"file:{number}"]], "file"))
        assert found == data
        assert steps > len(data) * 4 // 3 // load_request._SLICE
    assert (given["file:2"], given["file:e"], given["c"]) == (whole["file:2"], whole["file:e"], whole["c"])


@pytest.mark.parametrize("at", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 4, (2 << 20) - 5])
@pytest.mark.parametrize("wrong", [b"=", b"-", b"\n", b" "])
def test_what_is_no_base64_is_refused_wherever_it_is(at: int, wrong: bytes) -> None:
    text = bytearray(base64.b64encode(bytes(3 << 19)))
    text[at : at + 1] = wrong
    with pytest.raises(InvalidArgument, match="parameter 'f': expected base64"):
        driven(load_request._decoded(memoryview(bytes(text)), "f"))


def test_malformed_and_costly_json_ends_the_walk() -> None:
    for text in (b'{"a', b'{"a\\"', b'{"' + b"x" * LONG, b'"' * 7):
        (short, texts), _ = driven(load_request._cut(text))
        assert (short, texts) == (text, {})
    with pytest.raises(InvalidArgument, match=f"more than {MAX_QUOTES} texts"):
        driven(load_request._cut(b'{"a": "' + b'\\"' * (MAX_QUOTES + 1) + b'"}'))


async def test_a_model_with_a_large_file_is_loaded_and_others_are_refused_by_name(
    serve: Any, models_folder: Repository
) -> None:
    models_folder.bare("double", onnx_files.scale(2))
    serving: Serving = await serve(models_folder.root)
    assert serving.server is not None
    model = base64.b64encode(onnx_files.scale(3).SerializeToString()).decode()
    large = base64.b64encode(os.urandom(9 << 20)).decode()
    config = json.dumps({"backend": "onnxruntime", "max_batch_size": 8})

    async def load(client: RawClient, **parameters: Any) -> tuple[int, str]:
        response = await client.request("POST", LOAD, json.dumps({"parameters": parameters}).encode())
        return response.status, json.loads(response.body)["error"] if response.body else ""

    async with await RawClient.connect(serving.server.address) as client:
        files = {"file:1/model.onnx": model, "file:1/more.bin": large}
        assert await load(client, config=config, **files) == (200, "")
        response = await client.request("POST", INFER, BODY)
        assert json.loads(response.body)["outputs"][0]["data"] == [3, 6, 9, 12]
        for name, value, words in (
            ("file:1/more.bin", large[:-9] + "-" + large[-8:], "parameter 'file:1/more.bin': expected base64"),
            ("more", "x" * LONG, "unrecognized load parameter 'more'"),
            # With escapes, a text counts as JSON.
            ("file:1/more.bin", large.replace("A", "\u00c4", 1), f"at most {JSON_BYTES}"),
        ):
            status, error = await load(client, **{"config": config, **files, name: value})
            assert (status, words in error) == (400, True), error
        status, error = await load(client, config="x" * LONG)
        assert (status, "config is no ModelConfig in JSON" in error) == (500, True)
        status, error = await load(client, config=config, **{"file:1/x": "A" * LOAD_BYTES})
        assert (status, f"at most {LOAD_BYTES} are accepted" in error) == (400, True)
        response = await client.request("POST", INFER, BODY)
        assert json.loads(response.body)["outputs"][0]["data"] == [3, 6, 9, 12]
    assert serving.server.memory.bodies.held < 1 << 20
