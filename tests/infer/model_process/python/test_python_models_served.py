"""Python models through the server, as clients meet them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from services.infer.model_process import instance
from shoal.client.aio import _of_stream as of_stream
from shoal.errors import Code, ShoalError
from shoal.inference.v2 import inference_pb2 as pb
from tests.breakable import until
from tests.infer.conftest import floats, output, request


@pytest.fixture(params=["process", "shared"])
def isolation(request) -> str:
    return request.param


OWN = """
    import numpy as np
    class Model:
        inputs = {"x": ("FP32", [-1, 4])}
        outputs = {"y": ("FP32", [-1, 4])}
        def predict(self, batch):
            return {"y": 2 * batch["x"]}
"""

ADD_SUB = """
    import json
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def initialize(self, args):
            self.model_config = model_config = json.loads(args["model_config"])
            output0_config = pb_utils.get_output_config_by_name(model_config, "OUTPUT0")
            output1_config = pb_utils.get_output_config_by_name(model_config, "OUTPUT1")
            self.output0_dtype = pb_utils.triton_string_to_numpy(output0_config["data_type"])
            self.output1_dtype = pb_utils.triton_string_to_numpy(output1_config["data_type"])

        def execute(self, requests):
            responses = []
            for request in requests:
                in_0 = pb_utils.get_input_tensor_by_name(request, "INPUT0")
                in_1 = pb_utils.get_input_tensor_by_name(request, "INPUT1")
                out_0, out_1 = (in_0.as_numpy() + in_1.as_numpy(), in_0.as_numpy() - in_1.as_numpy())
                responses.append(pb_utils.InferenceResponse(output_tensors=[
                    pb_utils.Tensor("OUTPUT0", out_0.astype(self.output0_dtype)),
                    pb_utils.Tensor("OUTPUT1", out_1.astype(self.output1_dtype)),
                ]))
            return responses

        def finalize(self):
            print("Cleaning up...")
"""

ADD_SUB_CONFIG = """
name: "add_sub"
backend: "python"
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "INPUT1" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 4 ] }, { name: "OUTPUT1" data_type: TYPE_FP32 dims: [ 4 ] } ]
instance_group [{ kind: KIND_CPU }]
"""


async def test_a_class_with_predict(repo, serve):
    repo.python("double", OWN)
    serving = await serve()
    response = await serving.stub.ModelInfer(request("double", x=floats([1, 2, 3, 4])))
    assert output(response, "y").tolist() == [[2, 4, 6, 8]]
    config = (await serving.stub.ModelConfig(pb.ModelConfigRequest(name="double"))).config
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("python", "model.py", 64)


async def test_tritons_add_sub_as_it_is_published(repo, serve):
    repo.python("add_sub", ADD_SUB, ADD_SUB_CONFIG)
    serving = await serve()
    a, b = np.arange(4, dtype=np.float32), np.full(4, 10, np.float32)
    response = await serving.stub.ModelInfer(request("add_sub", INPUT0=a, INPUT1=b))
    assert output(response, "OUTPUT0").tolist() == [10, 11, 12, 13]
    assert output(response, "OUTPUT1").tolist() == [-10, -9, -8, -7]


async def test_requests_share_an_execution_and_only_the_failing_one_fails(repo, serve):
    repo.python(
        "m",
        """
        import json, os, time
        import numpy as np
        import triton_python_backend_utils as pb_utils
        class TritonPythonModel:
            def execute(self, requests):
                responses = []
                for request in requests:
                    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
                    if (x == 13).any():
                        error = pb_utils.TritonError("thirteen", pb_utils.TritonError.INVALID_ARG)
                        responses.append(pb_utils.InferenceResponse(error=error))
                        continue
                    if (x == 14).any():
                        raise ValueError("fourteen")
                    if (x == 15).any():
                        os._exit(9)
                    if (x == 1).any():
                        time.sleep(0.2)
                    sizes = np.full((len(x), 1), len(requests), np.int32)
                    tensors = [pb_utils.Tensor("y", 2 * x), pb_utils.Tensor("n", sizes)]
                    responses.append(pb_utils.InferenceResponse(tensors))
                return responses
        """,
        """backend: "python" max_batch_size: 16
        input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } output { name: "n" data_type: TYPE_INT32 dims: [ 1 ] }""",
    )
    serving = await serve()

    # Straight to the core, so that they arrive in this order: the first one keeps the model busy meanwhile.
    async def ask(value: float):
        try:
            return output(await serving.core.infer(request("m", x=floats([value]))), "y").tolist()
        except ShoalError as err:
            return err.code, err.message

    outcomes = await asyncio.gather(*(ask(value) for value in (1, 2, 13, 3, 14, 4, 15, 5)))
    assert [outcomes[n] for n in (0, 1, 3, 5, 7)] == [[[2]], [[4]], [[6]], [[8]], [[10]]]
    assert outcomes[2] == (Code.INVALID_ARGUMENT, "thirteen")
    assert outcomes[4][0] == Code.INTERNAL
    assert "ValueError: fourteen (model.py, line 15)" in outcomes[4][1]
    assert outcomes[6][0] == Code.INTERNAL
    assert "process died (exit code 9)" in outcomes[6][1]
    # What killed the process is not carried to the next one.
    code, details = await ask(15)
    assert code == Code.INTERNAL
    assert "it is rejected for" in details

    async def is_back() -> bool:  # Until then, calls are told when to come back.
        return await ask(16) == [[32]]

    await until(is_back)


async def test_a_request_beside_others_that_crash_the_process_is_never_rejected(repo, serve, monkeypatch):
    monkeypatch.setattr(instance, "_RESTART_MAX_S", 0.05)
    repo.python(
        "m",
        """
        import os, time
        class Model:
            inputs = {"x": ("FP32", [-1, 1])}
            outputs = {"y": ("FP32", [-1, 1])}
            def predict(self, batch):
                if (batch["x"] >= 100).any():
                    os._exit(3)
                if (batch["x"] == 1).any():
                    time.sleep(0.2)
                return {"y": 2 * batch["x"]}
        """,
    )
    serving = await serve()

    async def ask(value: float):
        try:
            return output(await serving.core.infer(request("m", x=floats([value]))), "y").tolist()
        except ShoalError as err:
            return err.message

    async def is_back() -> bool:
        return await ask(5) == [[10]]

    for n in range(5):
        # The first one keeps the model busy, so that the others are one batch.
        _, right, died = await asyncio.gather(ask(1), ask(2), ask(100 + n))
        assert right == [[4]], n
        assert "process died (exit code 3)" in died
        await until(is_back)


ODD = """
    import numpy as np
    class Unspeakable(Exception):
        def __str__(self):
            raise RuntimeError("no text")
    class Model:
        inputs = {"x": ("FP32", [-1, 1])}
        outputs = {"y": ("BYTES", [-1, 1])}
        def predict(self, batch):
            x = batch["x"]
            if (x == 14).any():
                raise ValueError("bad \\udc80 text")
            if (x == 15).any():
                raise Unspeakable
            texts = ["caf\\udce9" if value == 13 else str(int(value)) for value in x[:, 0]]
            return {"y": np.array(texts, object)[:, None]}
"""

ODD_TRITON = """
    import numpy as np
    import triton_python_backend_utils as pb_utils
    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                x = int(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()[0, 0])
                texts = {14: "bad \\udc80 text", 15: ""}
                if x in texts:
                    responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(texts[x])))
                    continue
                y = np.array([["caf\\udce9" if x == 13 else str(x)]], object)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y)]))
            return responses
"""
ODD_CONFIG = """
    backend: "python" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } output { name: "y" data_type: TYPE_STRING dims: [ 1 ] }
"""


@pytest.mark.parametrize(("source", "config"), [(ODD, ""), (ODD_TRITON, ODD_CONFIG)], ids=["own", "triton"])
async def test_texts_that_no_message_carries_are_errors_of_their_request_alone(repo, serve, source, config):
    repo.python("m", source, config)
    serving = await serve()

    async def ask(value: int) -> str:
        try:
            return output(await serving.core.infer(request("m", x=floats([value]))), "y")[0, 0].decode()
        except ShoalError as err:
            return err.message

    found = await asyncio.gather(*(ask(value) for value in (2, 13, 3, 14, 15, 4)))
    assert [found[n] for n in (0, 2, 5)] == ["2", "3", "4"]
    assert "element 0 is text that UTF-8 cannot have: surrogates not allowed; use bytes" in found[1]
    assert "bad ? text" in found[3]
    if not config:
        assert "Unspeakable (model.py, line 14)" in found[4]

    async with asyncio.timeout(30):
        asked = [request("m", x=floats([value])) for value in (13, 14, 15, 5)]
        streamed = [response async for response in serving.stub.ModelStreamInfer(iter(asked))]
    assert [bool(response.error_message) for response in streamed] == [True, True, True, False]
    assert "bad ? text" in streamed[1].error_message
    if config:
        assert streamed[2].error_message == "no details"
        assert of_stream(streamed[2]).error is not None
    assert output(streamed[3].infer_response, "y").tolist() == [[b"5"]]
    (stats,) = (await serving.stub.ModelStatistics(pb.ModelStatisticsRequest(name="m"))).model_stats
    assert stats.inference_stats.fail.count == 6
    # None of them has ended the process.
    assert "died" not in "".join(found)


async def test_a_load_error_with_such_a_text_hides_no_other_model(repo, serve):
    repo.python("double", OWN)
    repo.python("bad", OWN + "        def load(self, folder, config): raise ValueError('cannot read \\udc80 file')")
    serving = await serve()
    index = (await serving.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert {row.name: row.state for row in index} == {"bad": "UNAVAILABLE", "double": "READY"}
    assert ["cannot read ? file" in row.reason for row in index if row.name == "bad"] == [True]


async def test_a_model_calls_another_one(repo, serve):
    repo.python("double", OWN)
    repo.python(
        "caller",
        """
        import asyncio
        import triton_python_backend_utils as pb_utils
        class TritonPythonModel:
            async def execute(self, requests):
                responses = []
                for request in requests:
                    x = pb_utils.get_input_tensor_by_name(request, "x")
                    asked = [pb_utils.InferenceRequest(model_name=name, requested_output_names=["y"], inputs=[x])
                             for name in ("double", "nobody")]
                    good, bad = await asyncio.gather(*(each.async_exec() for each in asked))
                    again = asked[0].exec()
                    y = pb_utils.get_output_tensor_by_name(good, "y").as_numpy()
                    text = bad.error().message() if bad.has_error() else ""
                    import numpy as np
                    responses.append(pb_utils.InferenceResponse([
                        pb_utils.Tensor("y", y + again.output_tensors()[0].as_numpy()),
                        pb_utils.Tensor("text", np.array([text.encode()], object))]))
                return responses
        """,
        """backend: "python"
        input { name: "x" data_type: TYPE_FP32 dims: [ 1, 4 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 1, 4 ] }
        output { name: "text" data_type: TYPE_STRING dims: [ 1 ] }""",
    )
    serving = await serve()
    response = await serving.stub.ModelInfer(request("caller", x=floats([1, 2, 3, 4])))
    assert output(response, "y").tolist() == [[4, 8, 12, 16]]
    assert b"Request for unknown model: 'nobody' is not found" in output(response, "text")[0]


INVALID = {
    "syntax": ("class Model:\n  def predict(self", "'(' was never closed (model.py, line"),
    "no model": ("x = 1", "model.py has no model: expected a class Model with predict(self, batch)"),
    "exit": ("import sys; sys.exit(3)", "model.py called sys.exit(3) while it was imported"),
    "import": ("import nothing_there", "ModuleNotFoundError: No module named 'nothing_there' (model.py, line 1)"),
    "no predict": ("class Model:\n  pass", "class Model has no method predict(self, batch)"),
    "no batch": (
        "class Model:\n  def predict(self): pass",
        "Model.predict(self) cannot be called as predict(self, batch)",
    ),
    "async": ("class Model:\n  async def predict(self, batch): pass", "Model.predict is async: expected def"),
    "undeclared": ("class Model:\n  def predict(self, batch): pass", "the inputs are not declared"),
    "datatype": (OWN.replace("FP32", "FP33", 1), "unknown datatype 'FP33'"),
    "load": (
        OWN + "        def load(self, folder, config): raise RuntimeError('no weights')",
        "RuntimeError: no weights",
    ),
    "no execute": ("class TritonPythonModel: pass", "TritonPythonModel has no method execute(self, requests)"),
    "two": (
        "class A:\n  def predict(self, b): 0\nclass B:\n  def predict(self, b): 0",
        "several classes with predict (A, B)",
    ),
}
# It ends its process, and in a shared process the loads of other models with it: in a repository of its own.
ENDING = {"os._exit": ("import os; os._exit(4)", "the model process ended while it loaded the model (exit code 4)")}


@pytest.mark.parametrize("models", [INVALID, ENDING], ids=["while the process lives", "with the process"])
async def test_an_invalid_model_file_is_reported_with_the_reason(repo, serve, models):
    for name, (source, _) in models.items():
        repo.python(name, source)
    repo.python("good", OWN)
    serving = await serve()
    index = {row.name: row for row in (await serving.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models}
    for name, (_, reason) in models.items():
        assert index[name].state == "UNAVAILABLE", name
        assert reason in index[name].reason, name
    assert index["good"].state == "READY"


async def test_a_python_model_gets_no_trial_run(repo, serve):
    fussy = OWN.replace("return", "assert batch['x'].all(), 'no zeros please'\n            return")
    repo.python("guessed", fussy)
    repo.python("told", fussy.replace("def predict", "max_batch_size = 4\n        def predict"))
    serving = await serve()
    for name, most in (("guessed", 0), ("told", 4)):
        config = (await serving.stub.ModelConfig(pb.ModelConfigRequest(name=name))).config
        assert config.max_batch_size == most
        response = await serving.stub.ModelInfer(request(name, x=floats([1, 2, 3, 4])))
        assert output(response, "y").tolist() == [[2, 4, 6, 8]]
