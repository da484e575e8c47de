"""Operations as steps: what they give goes on as rows of any shapes, without a tensor in between."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import cv2
import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from mesh.rpc.channel import connect
from mesh.rpc.server import Server
from services.infer.core import InferenceServer
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.operators.kernels_runtime import KernelsRuntime
from services.infer.rpc import inference_rpc
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources.repository import scan
from shoal.inference.v2 import inference_pb2_grpc
from tests.infer import onnx_files
from tests.infer.conftest import Serving, output, request
from tests.infer.ensembles.conftest import parameter, step, tensor
from tests.infer.ensembles.test_ensembles_served import refused, states

PAGE = np.repeat(np.arange(48, dtype=np.uint8).reshape(6, 8, 1), 3, axis=2)
MORE = (
    "max_batch_size: 0 "
    + tensor("input", "file", "1, 1", "STRING")
    + tensor("input", "where", "1, -1, 4")
    + tensor("output", "means", "-1, 1")
    + tensor("output", "whose", "-1", "INT32")
    + parameter("each.mean", "crops")
)


def averaging() -> object:
    """mean = that of an image of any size; no batch."""
    return onnx_files.model(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels"], ["mean3"], axes=[0, 1], keepdims=0),
            helper.make_node("ReduceMean", ["mean3"], ["mean"], axes=[0], keepdims=1),
        ],
        [("image", TensorProto.UINT8, ("h", "w", 3))],
        [("mean", TensorProto.FLOAT, (1,))],
    )


def counting() -> object:
    """tokens = how many of a row's places are real; places = how many there are."""
    return onnx_files.model(
        [
            helper.make_node("ReduceSum", ["mask", "axes"], ["tokens"], keepdims=1),
            helper.make_node("Sub", ["mask", "mask"], ["zeros"]),
            helper.make_node("Add", ["zeros", "one"], ["ones"]),
            helper.make_node("ReduceSum", ["ones", "axes"], ["places"], keepdims=1),
        ],
        [("mask", TensorProto.INT64, ("n", "width"))],
        [("tokens", TensorProto.INT64, ("n", 1)), ("places", TensorProto.INT64, ("n", 1))],
        [numpy_helper.from_array(np.array([1]), "axes"), numpy_helper.from_array(np.int64(1), "one")],
    )


def operation(folder, name: str, kind: str, **parameters: str) -> None:
    (folder.root / name / "1").mkdir(parents=True)
    said = "".join(parameter(key, value) for key, value in {"operation": kind, **parameters}.items())
    (folder.root / name / "config.pbtxt").write_text('backend: "kernels"\n' + said)


@pytest.fixture
async def served(models_folder, run_dir) -> AsyncIterator[Serving]:
    operation(models_folder, "decode", "decode_image")
    operation(models_folder, "crop", "crop_boxes", corners="false", turn_from="0")
    models_folder.put("mean", averaging(), config="max_batch_size: 0")
    models_folder.ensemble(
        "pages",
        step("decode", {"image": "file"}, {"image": "page"}),
        step("crop", {"image": "page", "boxes": "where"}, {"crops": "crops", "row": "whose"}),
        step("mean", {"image": "crops"}, {"mean": "means"}),
        more=MORE,
    )
    operation(models_folder, "tokens", "tokenize")
    (models_folder.root / "tokens/1/vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nfish\n")
    operation(models_folder, "pad", "pad_tokens", pad_to="own", multiple_of="4")
    models_folder.put("count", counting())
    models_folder.ensemble(
        "lengths",
        step("tokens", {"text": "text"}, {"input_ids": "ids"}),
        step("pad", {"input_ids": "ids"}, {"attention_mask": "mask"}),
        step("count", {"mask": "mask"}, {"tokens": "tokens", "places": "places"}),
        more=parameter("each.count", "mask"),
    )
    async with AsyncExitStack() as stack:
        runtimes = Runtimes([OnnxRuntime(), KernelsRuntime()])
        models = await stack.enter_async_context(Models(LoadContext.of(runtimes, QueueLimits())))
        core = InferenceServer(models, "test/infer-0")
        server = Server(f"unix:{run_dir}/s", [inference_rpc(core)], drain_ms=2000)
        await stack.enter_async_context(server)
        models.want(scan(models_folder.root))
        await models.settled()
        channel = await stack.enter_async_context(connect(f"unix:{run_dir}/s"))
        yield Serving(models, core, inference_pb2_grpc.GRPCInferenceServiceStub(channel), channel)


def asked(data: bytes, *boxes: list[float]):
    where = np.array(boxes, np.float32).reshape(1, -1, 4)
    return request("pages", file=np.array([[data]], object), where=where)


def png() -> bytes:
    return cv2.imencode(".png", PAGE)[1].tobytes()


async def test_boxes_of_any_size_are_cut_out_and_looked_at_one_by_one(served):
    assert states(served)["pages"] == ("READY", "")
    boxes = [[0, 0, 8, 6], [2, 1, 5, 3], [7, 5, 8, 6]]
    response = await served.stub.ModelInfer(asked(png(), *boxes))
    expected = [[PAGE[int(y0) : int(y1), int(x0) : int(x1)].mean()] for x0, y0, x1, y1 in boxes]
    assert np.allclose(output(response, "means"), expected)
    assert output(response, "whose").tolist() == [0, 0, 0]


async def test_a_page_without_boxes(served):
    response = await served.stub.ModelInfer(asked(png()))
    assert (output(response, "means").shape, output(response, "whose").shape) == ((0, 1), (0,))


async def test_a_file_that_is_no_image_is_told_by_the_step_that_reads_it(served):
    code, why = await refused(served, asked(b"no image", [0, 0, 1, 1]))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "in ensemble 'pages', step 0, model 'decode': " in why
    assert served.models.find("crop", "").statistics.fail.count == 0


async def test_texts_of_one_request_are_padded_each_to_its_own_length(served):
    pytest.importorskip("tokenizers")
    assert states(served)["lengths"] == ("READY", "")
    texts = [b"", b"fish " * 3, b"fish " * 9, b"fish fish"]
    response = await served.stub.ModelInfer(request("lengths", text=np.array(texts, object).reshape(-1, 1)))
    assert output(response, "tokens").tolist() == [[2], [5], [11], [4]]
    assert output(response, "places").tolist() == [[4], [8], [12], [4]]
