"""Explanations of responses, which requests ask for: over the wire, in streams, and on the command line."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from shoal.cli import explanation
from shoal.inference.v2 import inference_pb2 as pb
from tests import fork_server
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, request
from tests.infer.test_infer_process import Infer

TOLD = {
    "replica": "string_param",
    "version": "string_param",
    "cache": "string_param",
    "fired": "string_param",
    "batch_size": "int64_param",
    "queue_us": "int64_param",
    "gather_us": "int64_param",
    "compute_us": "int64_param",
    "scatter_us": "int64_param",
}
X = floats([1, 2, 3, 4], [5, 6, 7, 8])


def explained() -> pb.ModelInferRequest:
    asked = request("double", x=X)
    asked.parameters["explain"].bool_param = True
    return asked


@pytest.fixture
async def served(serve, models_folder: Repository):
    models_folder.bare("double", onnx_files.scale())
    return await serve(models_folder.root)


def check(parameters) -> None:
    told = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    assert {name: told.get(name) for name in TOLD} == TOLD
    assert parameters["fired"].string_param
    assert (parameters["replica"].string_param, parameters["version"].string_param) == ("test/infer-0", "1")
    assert parameters["cache"].string_param == "off"
    assert parameters["batch_size"].int64_param in (2, 4, 6)  # Those of one stream may be batched together.
    assert all(value.int64_param >= 0 for value in parameters.values() if value.HasField("int64_param"))


async def test_every_part_is_told(served):
    check((await served.stub.ModelInfer(explained())).parameters)


async def test_who_does_not_ask_is_told_nothing(served):
    asked = explained()
    asked.parameters["explain"].bool_param = False
    for silent in (request("double", x=X), asked):
        assert not (await served.stub.ModelInfer(silent)).parameters


async def test_a_stream_is_told_call_by_call(served):
    async def requests():
        yield explained()
        yield request("double", x=X)
        yield explained()

    responses = [response.infer_response async for response in served.stub.ModelStreamInfer(requests())]
    check(responses[0].parameters)
    assert not TOLD.keys() & set(responses[1].parameters)
    check(responses[2].parameters)


async def test_the_command_line_prints_it(python, models_folder: Repository, tmp_path: Path):
    models_folder.bare("double", onnx_files.scale())
    models_folder.put("kept", onnx_files.scale(), config="response_cache { enable: true }")
    with Infer(python, tmp_path / "infer.log", repository=str(models_folder.root)) as infer:
        await infer.until_serving()

        async def shoal(model: str, *options: str) -> str:
            args = ("infer", model, '{"x": [[1, 2, 3, 4]]}', "--gateway", infer.address, *options)
            done = await asyncio.to_thread(fork_server.run, *args, env=os.environ, timeout_s=60)
            assert done.returncode == 0, done.stderr
            return done.stdout

        said = await shoal("double", "--explain")
        for part in ("run by", "infer-0, version 1", "waited", "1 row in one batch", "model", " ms", "has none"):
            assert part in said, said
        await shoal("kept")
        said = await shoal("kept", "--explain")
        assert "hit (outputs of an earlier request, nothing was executed)" in said
        assert "waited" not in said
        assert json.loads(await shoal("kept", "--explain", "--json"))["parameters"]["cache"] == "hit"
        assert "run by" not in await shoal("double")


def test_what_a_model_says_itself_stays_beside_it():
    told = {"replica": "n/infer-0", "version": "2", "cache": "off", "mine": 1}
    assert explanation.others(told) == {"mine": 1}
    assert explanation.others({"version": "mine"}) == {"version": "mine"}
    assert explanation.rows({"version": "mine"}) == []


def test_the_steps_of_an_ensemble_are_rows_of_their_own():
    told = {
        "replica": "n/infer-0",
        "version": "2",
        "batch_size": 2,
        "fired": "steps",
        "compute_us": 30,
        "step_1_mine": 1,
    }
    told |= {
        "step_0_model": "a",
        "step_0_version": "3",
        "step_0_calls": 2,
        "step_0_batch_size": 5,
        "step_0_fired": "full",
    }
    told |= {
        "step_0_queue_us": 10,
        "step_0_compute_us": 30,
        "step_1_model": "b",
        "step_1_version": "1",
        "step_1_calls": 0,
    }
    first, second = explanation.steps(told)
    assert first == ("a", "3", 2, 5, "full (it was full)", "0.010 ms", "0.030 ms")
    assert second == ("b", "1", "skipped", None, None, None, None)
    assert ("executed with", "2 rows of its own, in the steps below") in explanation.rows(told)
    assert "batch ran because" not in dict(explanation.rows(told))
    assert explanation.others(told) == {"step_1_mine": 1}
    assert explanation.steps({"replica": "n/infer-0"}) == []
