"""Models of TorchServe, against the responses of a real one (recorded/record_torchserve.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.infer.models.version import State
from shoal.errors import Internal, InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conftest import output, request
from tests.infer.remote import configs
from tests.infer.remote.replay import Replay

PAIR = """
input { name: "body" data_type: TYPE_STRING dims: [ 1 ] }
input { name: "data" data_type: TYPE_STRING dims: [ 1 ] optional: true }
output { name: "answer" data_type: TYPE_STRING dims: [ 1 ] }
"""


@pytest.fixture
def torchserve() -> Iterator[Replay]:
    with Replay.of("torchserve").serving() as running:
        yield running


def said(**given: bytes) -> dict[str, np.ndarray]:
    return {name: np.array([value], object) for name, value in given.items()}


async def test_bytes_are_sent_and_received(front, torchserve: Replay, tmp_path: Path):
    url = f"grpc://{torchserve.address}"
    configs.put(tmp_path / "models", "m", url=url, protocol="torchserve", remote_model="reverse")
    near = await front(tmp_path / "models")
    metadata = near.core.model_metadata(pb.ModelMetadataRequest(name="m"))
    assert [(t.name, t.datatype, list(t.shape)) for t in (*metadata.inputs, *metadata.outputs)] == [
        ("data", "BYTES", [1]),
        ("prediction", "BYTES", [1]),
    ]
    got = await near.core.infer(request("m", **said(data=b"hello \x00\xff")))
    assert output(got, "prediction").tolist() == [b"data=\xff\x00 olleh"]
    got = await near.core.infer(request("m", **said(data=b"")))
    assert output(got, "prediction").tolist() == [b"data="]
    got = await near.core.infer(request("m", **said(data=bytes(range(256)) * 8)))
    assert output(got, "prediction").tolist() == [b"data=" + (bytes(range(256)) * 8)[::-1]]
    assert torchserve.unknown == []


async def test_several_inputs_and_a_version(front, torchserve: Replay, tmp_path: Path):
    parameters = {"protocol": "torchserve", "remote_model": "reverse", "remote_version": "1.0"}
    configs.put(tmp_path / "models", "m", PAIR, url=f"grpc://{torchserve.address}", **parameters)
    near = await front(tmp_path / "models")
    got = await near.core.infer(request("m", **said(body=b"abc", data=b"xyz")))
    assert output(got, "answer").tolist() == [b"body=cba|data=zyx"]
    assert torchserve.unknown == []


async def test_a_handler_that_raises_is_the_models_fault(front, torchserve: Replay, tmp_path: Path):
    url = f"grpc://{torchserve.address}"
    configs.put(tmp_path / "models", "m", url=url, protocol="torchserve", remote_model="reverse")
    near = await front(tmp_path / "models")
    with pytest.raises(Internal, match=r"for model 'm': Prediction failed$"):
        await near.core.infer(request("m", **said(data=b"bad")))
    with pytest.raises(InvalidArgument, match="unexpected shape"):
        await near.core.infer(request("m", data=np.array([b"a", b"b"], object)))


async def test_a_model_that_it_does_not_have(front, torchserve: Replay, tmp_path: Path):
    configs.put(tmp_path / "models", "nobody", url=f"grpc://{torchserve.address}", protocol="torchserve")
    near = await front(tmp_path / "models")
    with pytest.raises(Internal, match="Model not found: nobody"):
        await near.core.infer(request("nobody", **said(data=b"hello")))


async def test_its_calls_are_not_batched_here(front, torchserve: Replay, tmp_path: Path):
    url = f"grpc://{torchserve.address}"
    configs.put(tmp_path / "models", "m", "max_batch_size: 4", url=url, protocol="torchserve")
    near = await front(tmp_path / "models")
    (row,) = near.models.index()
    assert row.state is State.UNAVAILABLE
    assert "needs TYPE_STRING with dims [ 1 ]" in row.reason or "batches by itself: set it to 0" in row.reason
