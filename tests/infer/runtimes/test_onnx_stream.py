"""A ring, kernels and a real ONNX Runtime session in one stream: the same calls with and without a GPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kernels.memory import HostMemory, memory
from kernels.resize_norm import resize_norm
from services.infer.runtimes.onnx_stream import Outputs, StreamedModel
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
    image = place.empty((2, 3, 4, 4), np.float32)
    answers = []
    for _ in range(3):
        pictures = [rng.integers(0, 256, (9, 5, 3), dtype=np.uint8), rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)]
        expected = resize_norm(pictures, size=(4, 4))
        if place.name == "cpu":
            resize_norm(pictures, image)
        else:
            place.copy_in(expected, image, streamed.stream)
        outputs = Outputs(place, {"mean": ((2, 3), np.float32), "double": ((2, 3, 4, 4), np.float32)})
        streamed.run({"image": image}, outputs)
        answers.append((expected, streamed.answer(outputs)))
    for expected, answer in answers:
        got = answer.wait()
        # Sums of 16 float32 in another order.
        assert np.allclose(got["mean"], expected.mean(axis=(2, 3)), atol=1e-6)
        assert np.array_equal(got["double"], 2 * expected)
        assert answer.done


class Counting(HostMemory):
    """Counts the copies to the host."""

    def __init__(self) -> None:
        self.copies = 0

    def copy_out(self, array: np.ndarray, into: np.ndarray, stream: None) -> None:
        self.copies += 1
        np.copyto(into, array)


def test_all_outputs_take_one_copy(model: bytes) -> None:
    place = Counting()
    outputs = Outputs(place, {"mean": ((1, 3), np.float32), "double": ((1, 3, 4, 4), np.float32)})
    outputs.pinned = np.zeros_like(outputs.buffer)  # As on a GPU: memory of its own.
    streamed = StreamedModel(model, place)
    streamed.run({"image": np.ones((1, 3, 4, 4), np.float32)}, outputs)
    assert not outputs.pinned.any()
    streamed.answer(outputs).wait()
    assert place.copies == 1
    assert np.array_equal(outputs.pinned, outputs.buffer)
    assert outputs.arrays["double"].tobytes() == np.full((1, 3, 4, 4), 2, np.float32).tobytes()
    starts = [array.ctypes.data - outputs.buffer.ctypes.data for array in outputs.arrays.values()]
    assert starts == [0, 256]


def test_what_is_wrong_is_named(model: bytes) -> None:
    place = HostMemory()
    streamed = StreamedModel(model, place)
    image = np.zeros((2, 3, 4, 4), np.float32)
    mean = {"mean": ((2, 3), np.float32)}
    for inputs, outputs, told in (
        ({}, mean, r"input \['image'\] is missing"),
        ({"image": image, "x": image}, mean, r"no input \['x'\]"),
        ({"image": image}, {"logits": ((2, 3), np.float32)}, r"no output \['logits'\]"),
        ({"image": image[..., ::2]}, mean, "'image' is not contiguous"),
        ({"image": image.astype(np.float64)}, mean, "the model does not run"),
        ({"image": image[:, :2].copy()}, mean, "the model does not run"),
        ({"image": image}, {"mean": ((2, 4), np.float32)}, "the model does not run"),
    ):
        with pytest.raises(InvalidArgument, match=told):
            streamed.run(inputs, Outputs(place, outputs))


def test_an_array_on_the_wrong_side_is_told(model: bytes) -> None:
    class OnDevice:
        dtype = np.dtype(np.float32)
        shape = (2, 3, 4, 4)
        flags = np.zeros(1).flags

    with pytest.raises(InvalidArgument, match="'image' is on the GPU, the model on cpu"):
        StreamedModel(model, HostMemory()).run({"image": OnDevice()}, Outputs(HostMemory(), {}))


def test_a_gpu_that_this_onnx_runtime_has_not_is_told(model: bytes) -> None:
    class Gpu(HostMemory):
        name = "cuda"

        def stream(self) -> object:
            return type("Stream", (), {"ptr": 0})()

    with pytest.raises(FailedPrecondition, match="CUDAExecutionProvider"):
        StreamedModel(model, Gpu())
    with pytest.raises(FailedPrecondition, match="cannot load the model"):
        StreamedModel(b"no model", HostMemory())
