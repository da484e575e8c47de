"""A ring, kernels and a real ONNX Runtime session in one stream: the same calls with and without a GPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kernels.memory import HostMemory, memory
from kernels.resize_norm import resize_norm
from services.infer.onnx_stream import StreamedModel
from shoal.errors import FailedPrecondition, InvalidArgument


@pytest.fixture(scope="module")
def model() -> bytes:
    """image [n, 3, 4, 4] -> mean [n, 3] and double."""
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Add", ["image", "image"], ["double"]),
    ]
    shape = ["n", 3, 4, 4]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("double", TensorProto.FLOAT, shape),
        ],
        [onnx.numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return made.SerializeToString()


@pytest.mark.parametrize("where", [HostMemory, pytest.param(memory, marks=pytest.mark.gpu)])
def test_kernels_then_the_model_then_the_answer(where: type[HostMemory], model: bytes) -> None:
    place = where()
    streamed = StreamedModel(model, place)
    rng = np.random.default_rng(0)
    image, mean = place.empty((2, 3, 4, 4), np.float32), place.empty((2, 3), np.float32)
    answers = []
    for _ in range(3):
        pictures = [rng.integers(0, 256, (9, 5, 3), dtype=np.uint8), rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)]
        expected = resize_norm(pictures, size=(4, 4))
        if place.name == "cpu":
            resize_norm(pictures, image)
        else:
            place.copy_in(expected, image, streamed.stream)
        streamed.run({"image": image}, {"mean": mean})
        into = {"mean": place.pinned(24).view(np.float32).reshape(2, 3)}
        answers.append((expected.mean(axis=(2, 3)), streamed.answer({"mean": mean}, into)))
    for expected, answer in answers:
        # Sums of 16 float32 in another order.
        assert np.allclose(answer.wait()["mean"], expected, atol=1e-6)
        assert answer.done


def test_what_is_wrong_is_named(model: bytes) -> None:
    streamed = StreamedModel(model, HostMemory())
    image, mean = np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 3), np.float32)
    for inputs, outputs, told in (
        ({}, {"mean": mean}, r"input \['image'\] is missing"),
        ({"image": image, "x": image}, {"mean": mean}, r"no input \['x'\]"),
        ({"image": image}, {"logits": mean}, r"no output \['logits'\]"),
        ({"image": image[..., ::2]}, {"mean": mean}, "'image' is not contiguous"),
        ({"image": image.astype(np.float64)}, {"mean": mean}, "the model does not run"),
        ({"image": image[:, :2].copy()}, {"mean": mean}, "the model does not run"),
    ):
        with pytest.raises(InvalidArgument, match=told):
            streamed.run(inputs, outputs)
    with pytest.raises(InvalidArgument, match=r"output 'mean' is float32\[2, 3\], the memory for it float32\[2, 4\]"):
        streamed.answer({"mean": mean}, {"mean": np.zeros((2, 4), np.float32)})


def test_an_array_on_the_wrong_side_is_told(model: bytes) -> None:
    class OnDevice:
        dtype = np.dtype(np.float32)
        shape = (2, 3, 4, 4)
        flags = np.zeros(1).flags

    with pytest.raises(InvalidArgument, match="'image' is on the GPU, the model on cpu"):
        StreamedModel(model, HostMemory()).run({"image": OnDevice()}, {})


def test_a_gpu_that_this_onnx_runtime_has_not_is_told(model: bytes) -> None:
    class Gpu(HostMemory):
        name = "cuda"

        def stream(self) -> object:
            return type("Stream", (), {"ptr": 0})()

    with pytest.raises(FailedPrecondition, match="CUDAExecutionProvider"):
        StreamedModel(model, Gpu())
    with pytest.raises(FailedPrecondition, match="cannot load the model"):
        StreamedModel(b"no model", HostMemory())
