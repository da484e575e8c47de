"""Models of a real Triton."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import Internal, InvalidArgument
from shoal.oip.datatypes import DTYPES
from tests.infer.conftest import Serving, output, request
from tests.infer.remote import configs
from tests.infer.triton import repository, triton_process

SAME = ("same_bytes", "same_fp16", "same_bool", "same_uint16")
MODELS = ("add", "lookup", "refuse", "optional", "versions", "flat", "repeat", *SAME)


@pytest.fixture(scope="module")
def triton(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one that serves MODELS."""
    folder = tmp_path_factory.mktemp("triton")
    models = repository.write(folder / "models")
    for model in models.iterdir():
        if model.name not in MODELS:
            shutil.rmtree(model)
    with triton_process.running(repository_root / ".venv-triton", models, folder) as running:
        yield running.grpc


@pytest.fixture
async def near(front, triton: str, tmp_path: Path) -> Serving:
    for model in MODELS:
        configs.put(tmp_path / "models", model, url=f"grpc://{triton}")
    configs.put(tmp_path / "models", "first", url=f"grpc://{triton}", remote_model="versions", remote_version="1")
    return await front(tmp_path / "models")


async def test_a_real_triton(near: Serving):
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    got = await near.core.infer(request("add", a=a, b=b))
    assert output(got, "sum").tolist() == [[11, 22]]
    assert output(got, "difference").tolist() == [[-9, -18]]
    assert near.models.find("add", "").loaded.model.config.max_batch_size == 8
    flat = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert output(await near.core.infer(request("flat", x=flat)), "y").tolist() == flat.tolist()
    one = np.ones((1, 4), np.float32)
    assert output(await near.core.infer(request("versions", x=one)), "y").tolist() == (3 * one).tolist()
    assert output(await near.core.infer(request("first", x=one)), "y").tolist() == one.tolist()


async def test_tensors_of_every_datatype_are_sent_and_received(near: Serving):
    words = np.array([["é".encode(), b""], [b"a\0b\xff", b"x" * 1000]], object)
    assert output(await near.core.infer(request("same_bytes", x=words)), "y").tolist() == words.tolist()
    for name in SAME[1:]:
        x = np.array([[0, 1, 1]], DTYPES[name.removeprefix("same_").upper()])
        asked = request(name, x=np.zeros((1, 3), np.uint8))
        asked.inputs[0].datatype = name.removeprefix("same_").upper()
        asked.raw_input_contents[0] = x.tobytes()
        got = await near.core.infer(asked)
        assert (got.outputs[0].datatype, got.raw_output_contents[0]) == (asked.inputs[0].datatype, x.tobytes())


async def test_inputs_that_it_can_do_without(near: Serving):
    x = np.ones((1, 2), np.float32)
    assert output(await near.core.infer(request("optional", x=x)), "y").tolist() == [[101, 101]]
    assert output(await near.core.infer(request("optional", x=x, bias=x)), "y").tolist() == [[2, 2]]


async def test_a_model_that_raises(near: Serving):
    with pytest.raises(Internal, match="Failed to process the request"):
        await near.core.infer(request("lookup", i=np.array([[7]])))
    with pytest.raises(Internal, match="x is below zero"):
        await near.core.infer(request("refuse", x=-np.ones((1, 4), np.float32)))
    with pytest.raises(InvalidArgument, match="unexpected shape"):
        await near.core.infer(request("lookup", i=np.array([7])))
    assert output(await near.core.infer(request("lookup", i=np.array([[2]]))), "y").tolist() == [[30]]


async def test_a_decoupled_model_is_refused(near: Serving):
    rows = {row.name: row.reason for row in near.models.index()}
    assert "remote model 'repeat' is decoupled" in rows["repeat"]
    assert not any(reason for name, reason in rows.items() if name != "repeat")
