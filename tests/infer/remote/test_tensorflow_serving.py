"""Models of TensorFlow Serving, against exchanges in its own messages (recorded/record_tensorflow_serving.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.infer.models.version import State
from services.infer.remote import tensorflow_tensors
from services.infer.remote.connection import parsed
from services.infer.remote.remote_runtime import RemoteRuntime
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes.runtime import ModelFailed, SessionOptions
from shoal.errors import FailedPrecondition, Internal, InvalidArgument, ResourceExhausted
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.remote.v1 import tensorflow_serving_pb2 as tf
from tests.infer.conftest import Serving, output, request
from tests.infer.remote import configs
from tests.infer.remote.replay import Replay

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def tensorflow() -> Iterator[Replay]:
    with Replay.of("tensorflow_serving").serving() as running:
        yield running
        assert running.unknown == []


@pytest.fixture
async def near(front, tensorflow: Replay, tmp_path: Path) -> Serving:
    url = f"grpc://{tensorflow.address}"
    more = "max_batch_size: 8 instance_group { count: 1 }"
    configs.put(tmp_path / "models", "scale", more, url=url, protocol="tensorflow-serving")
    return await front(tmp_path / "models")


async def test_the_signature_is_the_remote_models(near: Serving):
    metadata = near.core.model_metadata(pb.ModelMetadataRequest(name="scale"))
    assert [(t.name, t.datatype, list(t.shape)) for t in (*metadata.inputs, *metadata.outputs)] == [
        ("x", "FP32", [-1, 4]),
        ("y", "FP32", [-1, 4]),
    ]


async def test_both_forms_of_its_responses(near: Serving):
    for x, y in ((ROWS, 2 * ROWS), (ROWS + 1, 2 * (ROWS + 1))):
        got = output(await near.core.infer(request("scale", x=x)), "y")
        np.testing.assert_array_equal(got, y)


async def test_values_that_are_not_there_are_as_the_last_one(near: Serving):
    got = output(await near.core.infer(request("scale", x=ROWS + 2)), "y")
    assert got.tolist() == [[1, 2, 2, 2], [2, 2, 2, 2]]


async def test_responses_that_do_not_fit(near: Serving):
    with pytest.raises(Internal, match=r"output 'y': expected \[-1,4\], got \[2,3\]"):
        await near.core.infer(request("scale", x=ROWS + 3))
    with pytest.raises(Internal, match="the remote server's response has no output 'y': it has 'z'"):
        await near.core.infer(request("scale", x=ROWS + 4))


async def test_only_the_bad_request_of_a_batch_gets_the_error(near: Serving):
    together = [ROWS[:1] - 9, ROWS[:1]]
    calls = [near.core.infer(request("scale", x=x)) for x in together]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(outcomes[0], InvalidArgument)
    assert "x is below zero" in outcomes[0].message
    assert output(outcomes[1], "y").tolist() == (2 * ROWS[:1]).tolist()


async def test_a_busy_server_is_passed_on(near: Serving):
    with pytest.raises(ResourceExhausted, match="too many") as caught:
        await near.core.infer(request("scale", x=ROWS[:1] + 7))
    assert caught.value.retry_after_ms == 1000


async def test_a_version_and_a_signature_of_its_own(front, tensorflow: Replay, tmp_path: Path):
    parameters = {"protocol": "tensorflow-serving", "remote_version": "3", "signature_name": "other"}
    url = f"grpc://{tensorflow.address}"
    configs.put(tmp_path / "models", "m", "max_batch_size: 8", url=url, remote_model="scale", **parameters)
    near = await front(tmp_path / "models")
    np.testing.assert_array_equal(output(await near.core.infer(request("m", x=ROWS)), "y"), 3 * ROWS)


@pytest.mark.parametrize("form", ["values", "content"])
def test_every_type(tensorflow: Replay, form):
    said = configs.about("every", url=f"grpc://{tensorflow.address}", protocol="tensorflow-serving")
    session = RemoteRuntime({}).load(Path("every"), SessionOptions(1, about=said))
    names = [spec.name for spec in session.outputs]
    got = dict(zip(names, session.run({"words": np.array([form.encode()], object)}, names), strict=True))
    session.close()
    assert got.pop("words").tolist() == [b"a\0b"]
    assert got.pop("bf16").tolist() == [[0x3FC0, 0xC000]]
    assert {array.dtype.str[1:] for array in got.values()} == set(got)
    assert all(array.tolist() == [[0, 1]] for array in got.values())


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        (
            "scale",
            {"signature_name": "nope"},
            "no signature 'nope': it has 'other', 'serving_default'; choose one with",
        ),
        ("sparse", {}, "input 'x' of the remote model is sparse or made of several tensors"),
        ("complex", {}, "input 'x' of the remote model is of TensorFlow's type 8, which requests cannot carry"),
    ],
)
def test_what_cannot_be_served_from_here(tensorflow: Replay, name, more, says):
    said = configs.about(name, url=f"grpc://{tensorflow.address}", protocol="tensorflow-serving", **more)
    with pytest.raises(FailedPrecondition) as caught:
        RemoteRuntime({}).load(Path(name), SessionOptions(1, about=said))
    assert says in caught.value.message


async def test_a_model_that_it_does_not_have_is_tried_again(front, tensorflow: Replay, tmp_path: Path):
    configs.put(tmp_path / "models", "nobody", url=f"grpc://{tensorflow.address}", protocol="tensorflow-serving")
    near = await front(tmp_path / "models")
    (row,) = near.models.index()
    assert row.state is State.UNAVAILABLE
    assert "Could not find any versions of model nobody" in row.reason
    assert near.models._models["nobody"].may_retry()


def tensor(size: int, **values: object) -> tf.TensorFlowTensor:
    return tf.TensorFlowTensor(tensor_shape=tf.TensorFlowShape(dim=[{"size": size}]), **values)


@pytest.mark.parametrize(
    ("datatype", "given", "says"),
    [
        ("FP32", tensor(1 << 30, dtype=tf.DT_FLOAT, float_val=[1.0]), "1073741824 elements, got 1"),
        ("FP32", tensor(1, dtype=tf.DT_FLOAT, float_val=[1.0, 2.0]), "1 elements, got 2"),
        ("FP32", tensor(-2, dtype=tf.DT_FLOAT), "negative dimension"),
        ("INT8", tensor(1, dtype=tf.DT_INT8, int_val=[300]), "a value is not one of INT8"),
        ("INT8", tensor(1, dtype=tf.DT_INT16, int_val=[3]), "expected INT8, got DT_INT16"),
        ("INT8", tf.TensorFlowTensor(dtype=tf.DT_INT8, tensor_shape={"unknown_rank": True}), "y has no shape"),
    ],
)
def test_tensors_that_are_none(datatype, given, says):
    with pytest.raises(InvalidArgument, match=says):
        tensorflow_tensors.from_message(given, TensorSpec("y", BY_NAME[datatype], (-1,)), "y")


def test_bytes_that_are_no_message():
    with pytest.raises(ModelFailed, match="response of 3 bytes is not what the protocol says"):
        parsed(b"\xff\xff\xff", tf.TensorFlowPredictResponse)
