"""Steps that take long to read, on a thread, and the ones behind them: nobody overtakes."""

from __future__ import annotations

import asyncio

import pytest

from services.infer.models.version import Version
from services.infer.sequences.arrival_order import ArrivalOrder
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conftest import Repository, output
from tests.infer.onnx_files import summing

CONFIG = """
max_batch_size: 4
sequence_batching {
  state { input_name: "total_in" output_name: "total_out" data_type: TYPE_FP32 dims: 1 }
}
"""
LONG = 20_000
"""Typed elements: more than are read on the event loop."""


def step(id: int, elements: int, *, start: bool = False) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="m")
    made.inputs.add(name="x", datatype="FP32", shape=[1, elements]).contents.fp32_contents.extend([1.0] * elements)
    made.parameters["sequence_id"].int64_param = id
    made.parameters["sequence_start"].bool_param = start
    return made


async def test_a_small_step_does_not_overtake_a_large_one(serve, models_folder: Repository):
    models_folder.put("m", summing(), config=CONFIG)
    served = await serve(models_folder.root)
    sizes = [1, LONG, 1, 2, LONG, 3]

    async def sent():
        for n, size in enumerate(sizes):
            yield step(1, size, start=n == 0)

    responses = [response async for response in served.stub.ModelStreamInfer(sent())]
    assert [output(response.infer_response, "total").item() for response in responses] == [
        sum(sizes[: n + 1]) for n in range(len(sizes))
    ]


async def test_a_cancelled_waiter_does_not_block_later_steps(serve, models_folder: Repository):
    models_folder.put("m", summing(), config=CONFIG)
    served = await serve(models_folder.root)
    await served.core.infer(step(1, 1, start=True))
    tasks = [asyncio.create_task(served.core.infer(step(1, size))) for size in (LONG, LONG, 5)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[1], asyncio.CancelledError)
    assert [output(outcomes[n], "total").item() for n in (0, 2)] == [1 + LONG, 1 + LONG + 5]
    version = served.models.find("m", "")
    assert version.arrival_order.is_free(("", 1))


async def test_a_step_does_not_wait_for_another_tenants_sequence_with_its_id(
    serve, models_folder: Repository, monkeypatch: pytest.MonkeyPatch
):
    models_folder.put("m", summing(), config=CONFIG)
    served = await serve(models_folder.root)
    read_in_turns, reading, may_end = served.core._read_in_turns, asyncio.Event(), asyncio.Event()

    async def read_slowly(message: pb.ModelInferRequest, version: Version, tenant: str) -> object:
        if message.id == "slow":
            reading.set()
            await may_end.wait()
        return await read_in_turns(message, version, tenant)

    monkeypatch.setattr(served.core, "_read_in_turns", read_slowly)
    slow = step(1, LONG, start=True)
    slow.id = "slow"
    first = asyncio.create_task(served.core.infer(slow, tenant="acme"))
    await reading.wait()
    async with asyncio.timeout(30):
        response = await served.core.infer(step(1, LONG, start=True), tenant="globex")
    assert output(response, "total").item() == LONG
    assert not first.done()
    may_end.set()
    assert output(await first, "total").item() == LONG


async def test_first_come_first_served():
    line, seen = ArrivalOrder(), []

    async def one(n: int) -> None:
        async with line.in_order(("", 7)):
            await asyncio.sleep(0)
            seen.append(n)

    async with line.in_order(("", 8)):
        await asyncio.gather(*(one(n) for n in range(5)))
        assert not line.is_free(("", 8))
    assert seen == list(range(5))
    assert line.is_free(("", 7))
    assert line.is_free(("", 8))
    with pytest.raises(ZeroDivisionError):
        async with line.in_order(("", 9)):
            raise ZeroDivisionError
    assert line.is_free(("", 9))
