"""Runs that a caller makes long by the values of its inputs: others go on, and they end when the caller leaves."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

# Hours of rounds.
ENDLESS = 10**12


@pytest.mark.parametrize(
    "config", ["", 'input [ { name: "n" data_type: TYPE_INT64 dims: [ 1, 1 ] reshape { shape: [ 1 ] } } ]']
)
async def test_an_endless_run_holds_no_other_call_and_ends_when_its_caller_leaves(
    serve, models_folder: Repository, config: str
) -> None:
    """Shapes and sizes do not tell it: after short runs, it was made on the event loop, and nothing was answered."""
    models_folder.put("counting", onnx_files.counting(), config=config)
    models_folder.put("double", onnx_files.scale(2))
    served = await serve(models_folder.root)
    shape = (1, 1) if config else (1,)

    def counting(rounds: int):
        return request("counting", n=np.full(shape, rounds))

    for _ in range(20):
        assert output(await served.stub.ModelInfer(counting(3)), "y").tolist() == [3]
    endless = served.stub.ModelInfer(counting(ENDLESS), timeout=1)
    for _ in range(20):
        answer = await served.stub.ModelInfer(request("double", x=floats([1, 2, 3, 4])), timeout=30)
        assert output(answer, "y").tolist() == [[2, 4, 6, 8]]
        await asyncio.sleep(0.01)
    with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
        await endless
    # Its instance is free again.
    assert output(await served.stub.ModelInfer(counting(4), timeout=30), "y").tolist() == [4]
