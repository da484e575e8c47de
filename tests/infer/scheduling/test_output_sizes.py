"""Outputs bound a batch before they exist, and are reserved in the memory of their requests."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from mesh.h2.memory_account import MemoryAccount
from services.infer.model_process.inner_calls import _TenantMemory
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.output_sizes import OutputSizes
from services.infer.scheduling.statistics import Shed
from shoal.errors import ResourceExhausted
from shoal.oip.datatypes import BY_NAME
from tests.breakable import until
from tests.infer.scheduling.test_scheduler import Bench, call, values

MIB = 1 << 20
FLOATS = MIB // 4


def wide(mib: int):
    """Return a function of a model whose output has so many MiB for each row."""
    return lambda x: np.repeat(x, mib * FLOATS, axis=1)


def learned(max_mib: int) -> OutputSizes:
    return OutputSizes(max_mib * MIB, None)


async def run_queued(bench: Bench, *rows: int) -> list[int]:
    """Queue requests with so many rows behind a busy model; return the rows of their runs."""
    first = await bench.occupied()
    done = len(bench.model.runs)
    tasks = await bench.queued(*(call(*[1.0] * count) for count in rows))
    bench.model.gate.set()
    await asyncio.gather(first, *tasks)
    return [len(run) for run in bench.model.runs[done + 1 :]]


async def test_a_batch_is_cut_so_that_its_outputs_fit():
    bench = Bench(outputs=learned(4))
    bench.model.compute = wide(1)
    async with bench.scheduler:
        # The first run, which keeps the model busy, measures a row of 1 MiB.
        assert await run_queued(bench, *[1] * 8) == [4, 4]
        assert await run_queued(bench, 3, 3, 2) == [3, 3, 2]


async def test_a_request_with_larger_outputs_runs_alone():
    bench = Bench(outputs=learned(2))
    bench.model.compute = wide(1)
    async with bench.scheduler:
        assert await run_queued(bench, 1, 5, 1) == [1, 5, 1]


async def test_the_first_run_of_a_shape_is_one_request():
    bench = Bench(outputs=learned(4))
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(*(call(1, key="new") for _ in range(5)))
        bench.model.gate.set()
        await asyncio.gather(first, *tasks)
        assert [len(run) for run in bench.model.runs] == [1, 1, 4]


async def test_a_batch_whose_outputs_leave_no_room_for_more_rows_does_not_wait_for_them():
    bench = Bench(outputs=learned(4), policy=BatchPolicy(8, 1 << 20, delay_s=600.0))
    bench.model.compute = wide(1)
    async with bench.scheduler, asyncio.timeout(30):
        # Of a shape that nothing has measured, one request runs.
        await bench.scheduler.submit(call(1))
        await asyncio.gather(*(bench.scheduler.submit(call(1)) for _ in range(4)))
        assert [len(run) for run in bench.model.runs] == [1, 4]


def test_outputs_that_shrink_are_believed_after_some_runs():
    sizes = learned(8)
    sizes.add("k", 1, [np.zeros(8 * FLOATS, np.float32)])
    assert sizes.max_rows("k") == 1
    for _ in range(40):
        sizes.add("k", 1, [np.zeros(FLOATS, np.float32)])
    assert sizes.max_rows("k") == 8
    sizes.add("k", 2, [np.zeros(8 * FLOATS, np.float32)])
    assert sizes.max_rows("k") == 2, "growth is believed at once"


def test_many_shapes_take_bounded_memory():
    sizes = learned(8)
    for n in range(5_000):
        sizes.add(n, 1, [np.zeros(1, np.float32)])
    assert sizes.max_rows(4_999) > 1
    assert sum(sizes.max_rows(n) > 1 for n in range(5_000)) <= 1_024


@pytest.mark.parametrize(("shape", "kind", "most"), [((-1, FLOATS), "FP32", 64), ((-1, 0), "FP32", 1 << 31)])
def test_fixed_shapes_need_no_measurement(shape, kind, most):
    sizes = OutputSizes.of(Signature((), (TensorSpec("y", BY_NAME[kind], shape),), 8), 64 * MIB)
    assert (sizes.max_rows("any"), sizes.is_learning) == (most, False)


@pytest.mark.parametrize(("shape", "kind"), [((-1, -1), "FP32"), ((-1, 4), "BYTES")])
def test_shapes_that_vary_and_texts_are_measured(shape, kind):
    sizes = OutputSizes.of(Signature((), (TensorSpec("y", BY_NAME[kind], shape),), 8), 64 * MIB)
    assert (sizes.max_rows("any"), sizes.is_learning) == (1, True)


def test_texts_count_with_their_objects():
    sizes = learned(1)
    sizes.add("k", 2, [np.array([["x" * 1000] * 3000] * 2, object)])
    assert sizes.row_bytes("k") == 3000 * (1000 + 8 + 56)


class Memory(_TenantMemory):
    """Memory of an account that a test reads."""

    def __init__(self, mib: int) -> None:
        self.account = MemoryAccount(mib * MIB)
        super().__init__(self.account.share())


def counted(memory: Memory, *rows: float) -> list[InferenceRequest]:
    """Return requests of one row each whose memory is that of `memory`."""
    requests = [call(row) for row in rows]
    for request in requests:
        request.memory = memory
    return requests


async def test_outputs_are_reserved_while_a_model_runs_and_released_afterwards():
    bench, memory = Bench(outputs=OutputSizes(64 * MIB, 8 * MIB)), Memory(30)
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(*counted(memory, 1, 2, 3))
        entered = bench.model.entered
        assert memory.account.held == 0
        bench.model.gate.set()
        bench.model.gate.clear()
        await first
        await until(lambda: bench.model.entered > entered)
        assert memory.account.held == 24 * MIB
        bench.model.gate.set()
        await asyncio.gather(*tasks)
        assert memory.account.held == 0


async def test_what_finds_no_room_waits_for_the_next_batch():
    bench, memory = Bench(outputs=OutputSizes(64 * MIB, 8 * MIB)), Memory(20)
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(*counted(memory, 1, 2, 3))
        bench.model.gate.set()
        await first
        await asyncio.gather(*tasks)
        assert bench.model.runs == [[-1], [1, 2], [3]]
        assert memory.account.held == 0


@pytest.mark.parametrize("preferred", [frozenset(), frozenset({1})])
async def test_an_idle_instance_refuses_nothing_that_has_room_once_another_one_ends(preferred):
    policy = BatchPolicy(8, 1 << 20, preferred=preferred)
    bench = Bench(outputs=OutputSizes(64 * MIB, 8 * MIB), policy=policy, instances=2)
    memory = Memory(10)
    async with bench.scheduler:
        bench.model.gate.clear()
        requests = counted(memory, 1, 2, 3)
        first = bench.submit(requests[0])
        await until(lambda: bench.model.entered)
        tasks = await bench.queued(*requests[1:])
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        bench.model.gate.set()
        found = [values(result) for result in await asyncio.gather(first, *tasks)]
        assert found == [[2], [4], [6]]
        assert bench.statistics.shed == 0
        assert memory.account.held == 0


async def test_a_request_whose_outputs_never_fit_is_refused_and_the_next_one_runs():
    bench, memory = Bench(outputs=OutputSizes(64 * MIB, 8 * MIB)), Memory(4)
    async with bench.scheduler:
        first = await bench.occupied()
        tasks = await bench.queued(*counted(memory, 1), call(5))
        bench.model.gate.set()
        await first
        with pytest.raises(ResourceExhausted):
            await tasks[0]
        assert (await tasks[1]).outputs[0].tolist() == [[10]]
        assert (bench.statistics.shed, bench.statistics.shed_by[Shed.MEMORY]) == (1, 1)
        assert memory.account.held == 0


async def test_one_huge_output_shuts_out_no_other_request_of_its_shape():
    bench, memory = Bench(outputs=learned(4)), Memory(200)
    huge = np.broadcast_to(np.float32(0), (1, 600 * FLOATS))
    bench.model.compute = lambda x: huge if x[0, 0] == 666 else 2 * x
    async with bench.scheduler:
        await bench.scheduler.submit(call(666))
        for _ in range(60):
            request = call(1, 2, 3)
            request.memory = memory
            assert values(await bench.scheduler.submit(request)) == [2, 4, 6]
        assert memory.account.held == 0
        assert await run_queued(bench, *[1] * 8) == [8], "the huge one is forgotten"


async def test_outputs_of_a_run_whose_version_ends_are_released():
    bench, memory = Bench(outputs=OutputSizes(64 * MIB, 8 * MIB)), Memory(20)
    async with bench.scheduler:
        bench.model.gate.clear()
        task = bench.submit(*counted(memory, 1))
        await until(lambda: bench.model.entered)
        assert memory.account.held == 8 * MIB
        bench.scheduler.end_all()
        bench.model.gate.set()
        await asyncio.gather(task, return_exceptions=True)
        assert memory.account.held == 0
