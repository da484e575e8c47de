"""The sequence scheduler, scene by scene, in simulated time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from dataclasses import replace

import pytest

from mesh.h2.memory_account import MemoryAccount, TenantShares
from services.infer.requests.request import InferenceRequest
from services.infer.requests.request_memory import Uncounted
from services.infer.scheduling.output_sizes import OutputSizes
from services.infer.scheduling.queue import QueueLimits
from services.infer.sequences.sequence_table import SequenceTable
from services.infer.sequences.step import Sequence, SequenceStep
from shoal.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted
from tests.infer.scheduling.virtual_time import run
from tests.infer.sequences.simulated import Bench, settings, step


class Sender(Uncounted):
    """Memory of a call of one sender."""

    def __init__(self, name: str) -> None:
        self.sender = name


async def refused(kind: type[Exception], call: Awaitable[object]) -> str:
    with pytest.raises(kind) as err:
        await call
    return str(err.value)


def later(call: Awaitable[float]) -> asyncio.Future[float]:
    return asyncio.ensure_future(call)


def test_direct_keeps_the_row_and_fills_gaps():
    async def scene() -> None:
        bench = Bench(settings(slots=4, rows=4))
        async with bench.scheduler:
            await asyncio.gather(*(bench.total(step(n, start=True)) for n in (1, 2, 3)))
            await asyncio.gather(bench.total(step(3)), bench.total(step(1)))
            await bench.total(step(2, end=True))
            await bench.total(step(4, start=True))
            assert [(ran.run, ran.row, ran.id) for ran in bench.log] == [
                *((1, 0, 1), (1, 1, 2), (1, 2, 3)),
                *((2, 0, 1), (2, 2, 3)),
                (3, 1, 2),
                (4, 1, 4),
            ]

    run(scene())


def test_direct_waits_for_its_share_of_the_rows():
    async def scene() -> None:
        bench = Bench(settings(slots=4, rows=4, delay_s=0.5, utilization=0.5))
        clock = asyncio.get_running_loop().time
        async with bench.scheduler:
            first = later(bench.total(step(1, start=True)))
            await asyncio.sleep(0.2)
            await asyncio.gather(first, bench.total(step(2, start=True)))
            assert clock() == pytest.approx(0.21)
            result = await bench.scheduler.submit(step(1))
            assert (result.fired, clock()) == ("delay", pytest.approx(0.72))

    run(scene())


def test_outputs_bound_the_batches_of_oldest():
    async def scene() -> None:
        bench = Bench(settings(direct=False, slots=8, rows=8), outputs=OutputSizes(24, None))
        async with bench.scheduler:
            # The first run measures a row: 8 bytes.
            for starts in (True, False):
                await asyncio.gather(*(bench.total(step(n, start=starts)) for n in range(1, 8)))
            runs = Counter(ran.run for ran in bench.log)
            assert list(runs.values()) == [1, 3, 3, 3, 3, 1]
            assert [ran.id for ran in bench.log] == [*range(1, 8)] * 2

    run(scene())


def test_a_batch_of_oldest_that_outputs_fill_does_not_wait_for_more():
    async def scene() -> None:
        bench = Bench(settings(direct=False, slots=8, rows=8, delay_s=600.0), outputs=OutputSizes(24, None))
        async with bench.scheduler:
            # Of a shape that nothing has measured, one step runs.
            await bench.total(step(1, start=True))
            await asyncio.gather(*(bench.total(step(n, start=True)) for n in (2, 3, 4)))
            assert asyncio.get_running_loop().time() == pytest.approx(0.02)
            assert Counter(ran.run for ran in bench.log) == {1: 1, 2: 3}

    run(scene())


@pytest.mark.parametrize("direct", [False, True])
def test_a_batch_is_measured_once_and_only_where_outputs_bound_it(monkeypatch, direct):
    measured = []
    add = OutputSizes.add

    def counted(sizes, key, rows, outputs):
        measured.append(key)
        add(sizes, key, rows, outputs)

    monkeypatch.setattr(OutputSizes, "add", counted)

    async def scene() -> None:
        bench = Bench(settings(direct=direct, slots=8, rows=8), outputs=OutputSizes(24, None))
        async with bench.scheduler:
            for starts in (True, False):
                await asyncio.gather(*(bench.total(step(n, start=starts)) for n in range(1, 8)))
            assert len(measured) == (0 if direct else len({ran.run for ran in bench.log}))

    run(scene())


def test_oldest_batches_the_first_arrivals():
    async def scene() -> None:
        bench = Bench(settings(direct=False, slots=8, rows=2))
        async with bench.scheduler:
            await asyncio.gather(*(bench.total(step(n, start=True)) for n in (5, 4, 3, 2, 1)))
            assert [(ran.run, ran.row, ran.id) for ran in bench.log] == [
                *((1, 0, 5), (1, 1, 4)),
                *((2, 0, 3), (2, 1, 2)),
                (3, 0, 1),
            ]

    run(scene())


def test_the_backlog_waits_for_an_end():
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1))
        async with bench.scheduler:
            await bench.total(step(1, start=True))
            waiting = [later(bench.total(step(2, n, start=n == 1))) for n in (1, 2)]
            third = later(bench.total(step(3, start=True, end=True)))
            await asyncio.sleep(1)
            assert [ran.id for ran in bench.log] == [1]
            await bench.total(step(1, end=True))
            assert await asyncio.gather(*waiting) == [1, 3]
            await bench.total(step(2, end=True))
            await third
            assert [ran.id for ran in bench.log] == [1, 1, 2, 2, 2, 3]

    run(scene())


def test_one_id_in_a_loop_does_not_starve_others():
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1))
        async with bench.scheduler:
            mine = [later(bench.total(step(1, n, start=True, end=True))) for n in (1, 2, 3)]
            other = later(bench.total(step(2, 9, start=True, end=True)))
            await asyncio.gather(*mine, other)
            assert [ran.id for ran in bench.log] == [1, 2, 1, 1]

    run(scene())


def test_tenants_get_their_shares_of_slots():
    async def scene() -> None:
        bench = Bench(settings(slots=4, rows=4), weights={"gold": 2.0})
        async with bench.scheduler:
            await bench.total(step(1, start=True), tenant="flood")
            flood = [later(bench.total(step(n, start=True), tenant="flood")) for n in range(2, 10)]
            gold = [later(bench.total(step(n, start=True), tenant="gold")) for n in range(20, 30)]
            await asyncio.sleep(1)
            for n in (1, 2, 3, 4):
                await bench.total(step(n, end=True), tenant="flood")
            await asyncio.sleep(1)
            assigned = [sequence.tenant for sequence in bench.scheduler.table.assigned[0]]
            assert sorted(assigned) == ["flood", "gold", "gold", "gold"]
            for task in (*flood, *gold):
                task.cancel()

    run(scene())


def test_tenants_with_one_id_have_sequences_of_their_own():
    async def scene() -> None:
        bench = Bench(settings(slots=2, rows=2))
        async with bench.scheduler:
            assert await bench.total(step(7, 1, start=True), tenant="acme") == 1
            with pytest.raises(InvalidArgument):
                await bench.total(step(7, 100), tenant="globex")
            assert await bench.total(step(7, 100, start=True), tenant="globex") == 100
            assert await bench.total(step(7, 2), tenant="acme") == 3
            assert await bench.total(step(7, 200, end=True), tenant="globex") == 300
            assert await bench.total(step(7, 3, end=True), tenant="acme") == 6
            assert len(bench.scheduler.table) == 0

    run(scene())


def test_a_model_continues_its_sequence_for_another_tenant():
    def inner(made: InferenceRequest) -> InferenceRequest:
        return replace(made, parameters=replace(made.parameters, inner_call=object()))

    async def scene() -> None:
        bench = Bench(settings(slots=2, rows=2))
        async with bench.scheduler:
            assert await bench.total(inner(step(7, 1, start=True)), tenant="acme") == 1
            assert await bench.total(inner(step(7, 2)), tenant="globex") == 3
            with pytest.raises(InvalidArgument):
                await bench.total(step(7, 100), tenant="acme")
            assert await bench.total(inner(step(7, 3, end=True)), tenant="acme") == 6
            assert len(bench.scheduler.table) == 0

    run(scene())


def test_a_full_queue_refuses():
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1), limits=QueueLimits(calls=3))
        async with bench.scheduler:
            await bench.total(step(1, start=True))
            waiting = [later(bench.total(step(2, start=n == 0))) for n in range(3)]
            await asyncio.sleep(0)
            said = await refused(ResourceExhausted, bench.total(step(3, start=True)))
            assert "Exceeds maximum queue size of model 'm': 3 requests" in said
            assert bench.statistics.shed == 1
            for task in waiting:
                task.cancel()

    run(scene())


def test_in_a_full_queue_the_tenant_with_the_most_steps_loses_its_newest():
    async def scene() -> None:
        bench = Bench(settings(slots=2, rows=2), limits=QueueLimits(calls=4))
        async with bench.scheduler:
            await bench.total(step(1, start=True), tenant="acme")
            await bench.total(step(1, start=True), tenant="flood")
            flood = [later(bench.total(step(n, start=True), tenant="flood")) for n in range(2, 6)]
            await asyncio.sleep(0)
            assert await bench.total(step(1), tenant="acme") == 2
            assert "Exceeds maximum queue size" in await refused(ResourceExhausted, flood.pop())
            await refused(ResourceExhausted, asyncio.gather(*(bench.total(step(1), tenant="flood") for _ in range(2))))
            assert bench.statistics.shed == 2
            assert not any(task.done() for task in flood)
            for task in flood:
                task.cancel()

    run(scene())


def test_in_queued_bytes_the_tenant_with_the_most_gives_way_and_small_ones_stay():
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1), limits=QueueLimits(size_bytes=1000))
        async with bench.scheduler:
            await bench.total(step(1, start=True), tenant="acme")
            large = [replace(step(n, start=True), size_bytes=480) for n in (2, 3)]
            flood = [later(bench.total(each, tenant="flood")) for each in large]
            small = [later(bench.total(step(n, start=True), tenant="acme")) for n in range(2, 12)]
            await asyncio.sleep(0)
            await refused(ResourceExhausted, flood[1])
            assert bench.scheduler.table.waiting_bytes == 480 + 80
            for task in (flood[0], *small):
                task.cancel()

    run(scene())


def test_one_sender_that_fills_the_queue_gives_way_to_others_of_its_tenant():
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1), limits=QueueLimits(calls=4))
        async with bench.scheduler:
            await bench.total(step(1, start=True))
            flood = [later(bench.total(step(n, start=True))) for n in range(2, 6)]
            await asyncio.sleep(0)
            other = step(1)
            other.memory = Sender("other")
            assert await bench.total(other) == 2
            await refused(ResourceExhausted, flood.pop())
            for task in flood:
                task.cancel()

    run(scene())


def test_an_expired_step_is_not_run_and_the_sequence_goes_on():
    async def scene() -> None:
        bench = Bench(settings())
        async with bench.scheduler:
            await bench.total(step(1, 1, start=True))
            running, late, good = (
                later(bench.total(step(1, 2))),
                later(bench.total(step(1, 4, timeout_us=5000))),
                later(bench.total(step(1, 8))),
            )
            assert await running == 3
            assert "it was not executed" in await refused(DeadlineExceeded, late)
            assert await good == 11
            assert bench.statistics.expired == 1
            assert bench.statistics.expired_executed == 0

    run(scene())


def test_a_cancelled_step_is_left_out_and_one_that_runs_counts():
    async def scene() -> None:
        bench = Bench(settings())
        async with bench.scheduler:
            await bench.total(step(1, 1, start=True))
            running, waiting = later(bench.total(step(1, 2))), later(bench.total(step(1, 4)))
            await asyncio.sleep(0.005)
            running.cancel()
            waiting.cancel()
            assert await bench.total(step(1, 8)) == 11
            assert bench.statistics.cancelled == 2

    run(scene())


@pytest.mark.parametrize("how", ["cancelled", "late", "failed"])
def test_a_start_that_is_not_run_starts_nothing(how):
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1))
        bench.poison.add(66.0)
        async with bench.scheduler:
            blocker = later(bench.total(step(9, start=True, end=True)))
            await asyncio.sleep(0.001)
            x, timeout_us = (66.0 if how == "failed" else 1.0), (2000 if how == "late" else 0)
            start = later(bench.total(step(1, x, start=True, timeout_us=timeout_us)))
            behind = [later(bench.total(step(1, 2))), later(bench.total(step(1, 4, end=True)))]
            again = later(bench.total(step(1, 8, start=True)))
            await asyncio.sleep(0.001)
            if how == "cancelled":
                start.cancel()
            else:
                await refused(DeadlineExceeded if how == "late" else Internal, start)
            for each in behind:
                assert "must specify the START flag" in await refused(InvalidArgument, each)
            assert await again == 8
            await blocker
            assert [ran.x for ran in bench.log if ran.id == 1] == [8]

    run(scene())


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_an_end_that_is_not_run_ends_all_the_same(how):
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1))
        async with bench.scheduler:
            await bench.total(step(1, start=True))
            running = later(bench.total(step(1)))
            end = later(bench.total(step(1, end=True, timeout_us=2000 if how == "late" else 0)))
            next_one = later(bench.total(step(2, start=True)))
            await asyncio.sleep(0.001)
            if how == "cancelled":
                end.cancel()
            else:
                await refused(DeadlineExceeded, end)
            assert await running == 2
            assert await next_one == 1, "its place is free"
            await refused(InvalidArgument, bench.total(step(1)))

    run(scene())


def test_steps_that_cannot_be_stacked_run_separately():
    async def scene() -> None:
        bench = Bench(settings(slots=4, rows=4))
        async with bench.scheduler:
            await asyncio.gather(*(bench.total(step(n, start=True, key=n % 2)) for n in (1, 2, 3, 4)))
            assert [(ran.run, ran.row) for ran in bench.log] == [(1, 0), (1, 2), (2, 1), (2, 3)]

    run(scene())


def test_order_is_preserved_with_preserve_ordering():
    async def scene() -> None:
        bench = Bench(settings(direct=False, slots=4, rows=1, preserves_order=True), instances=2)
        done: list[int] = []

        async def one(id: int) -> None:
            await bench.total(step(id, start=True, end=True))
            done.append(id)

        async with bench.scheduler:
            waiting = [later(one(id)) for id in (1, 2, 3, 4, 5)]
            await asyncio.sleep(0)
            waiting[1].cancel()
            await asyncio.wait(waiting)
            assert done == [1, 3, 4, 5]

    run(scene())


def test_with_preserve_ordering_a_step_that_waits_for_a_slot_holds_no_outcome_up():
    async def scene() -> None:
        bench = Bench(settings(direct=False, slots=2, rows=2, preserves_order=True))
        done: list[int] = []

        async def one(id: int, *, start: bool = False, end: bool = False) -> None:
            await bench.total(step(id, start=start, end=end))
            done.append(id)

        async with bench.scheduler:
            await asyncio.gather(one(1, start=True), one(2, start=True))
            waiting = [later(one(id, start=True)) for id in (3, 4)]
            await asyncio.sleep(0)
            # Neither sequence would end without these outcomes.
            await asyncio.wait_for(one(1), 1)
            await asyncio.wait_for(asyncio.gather(one(2, end=True), one(1)), 1)
            await asyncio.wait_for(waiting[0], 1)
            await asyncio.wait_for(one(1, end=True), 1)
            await asyncio.wait_for(waiting[1], 1)
            assert done == [1, 2, 1, 2, 1, 3, 1, 4]

    run(scene())


def test_with_preserve_ordering_a_slow_step_of_a_tenant_delays_no_answer_to_another():
    async def scene() -> None:
        bench = Bench(settings(direct=False, slots=2, rows=1, preserves_order=True))
        async with bench.scheduler:
            await asyncio.gather(*(bench.total(step(1, start=True), tenant=tenant) for tenant in ("a", "b")))
            flood = [later(bench.total(step(1), tenant="a")) for _ in range(10)]
            await asyncio.sleep(0)
            await bench.total(step(1), tenant="b")
            assert [each.done() for each in flood].count(True) <= 2
            await asyncio.gather(*flood)

    run(scene())


def test_a_sequence_that_got_no_slot_in_time_says_so():
    async def scene() -> None:
        bench = Bench(settings(slots=2))
        async with bench.scheduler:
            await asyncio.gather(*(bench.total(step(id, start=True)) for id in (1, 2)))
            said = await refused(DeadlineExceeded, bench.total(step(3, start=True, timeout_us=5000)))
            assert said.endswith("it was not executed, because other sequences held all slots (2) until then")

    run(scene())


def test_states_beyond_the_memory_of_their_tenant_are_not_kept():
    async def scene() -> None:
        account = MemoryAccount(10 * 8)
        bench = Bench(settings(slots=20, rows=20), states=TenantShares(account))
        async with bench.scheduler:
            # Two thirds of ten states of 8 bytes.
            for n in range(1, 7):
                await bench.total(step(n, start=True), tenant="flood")
            assert "no memory is left" in await refused(
                ResourceExhausted, bench.total(step(7, start=True), tenant="flood")
            )
            await refused(InvalidArgument, bench.total(step(7), tenant="flood"))
            assert await bench.total(step(1), tenant="flood") == 2, "its state has not grown"
            assert await bench.total(step(8, start=True, end=True), tenant="flood") == 1, "no state is kept"
            assert await bench.total(step(1, start=True), tenant="acme") == 1
            assert account.held == 7 * 8
            assert await bench.total(step(2, end=True), tenant="flood") == 2
            assert await bench.total(step(1, start=True), tenant="flood") == 1
            assert account.held == 6 * 8
            assert bench.statistics.success.count == 11
        assert account.held == 0

    run(scene())


def test_closing_runs_the_queued_steps():
    async def scene() -> None:
        bench = Bench(settings(slots=1, rows=1))
        async with bench.scheduler:
            await bench.total(step(1, start=True))
            waiting = [later(bench.total(step(n, start=True))) for n in (2, 3)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*waiting) == [1, 1]

    run(scene())


def test_an_execution_looks_only_at_sequences_with_a_step(monkeypatch):
    """However many have a place and nothing to do."""
    looks = 0
    plain = Sequence.head.fget

    def counted(sequence: Sequence) -> SequenceStep | None:
        nonlocal looks
        looks += 1
        return plain(sequence)

    async def scene() -> None:
        nonlocal looks
        bench = Bench(settings(direct=False, slots=3000, rows=4), limits=QueueLimits(calls=3000))
        async with bench.scheduler:
            await asyncio.gather(*(bench.total(step(n, start=True)) for n in range(1, 3001)))
            assert len(bench.scheduler.table.assigned[0]) == 3000
            monkeypatch.setattr(Sequence, "head", property(counted))
            runs, looks = len(bench.log), 0
            assert await asyncio.gather(*(bench.total(step(n)) for n in (7, 2999, 40))) == [2, 2, 2]
            assert [ran.id for ran in bench.log[runs:]] == [7, 2999, 40]
            assert looks < 20

    run(scene())


def test_a_slot_is_given_without_a_look_at_all_sequences_that_wait(monkeypatch):
    """Thousands wait, and thousands of slots may be free at once."""
    looks = 0
    plain = SequenceTable._load

    def counted(table: SequenceTable, tenant: str) -> float:
        nonlocal looks
        looks += 1
        return plain(table, tenant)

    async def scene() -> None:
        bench = Bench(settings(direct=False, slots=500, rows=500, idle_s=1.0), limits=QueueLimits(calls=1000))
        async with bench.scheduler:
            await asyncio.gather(*(bench.total(step(n, start=True), tenant="flood") for n in range(1, 501)))
            monkeypatch.setattr(SequenceTable, "_load", counted)
            waiting = [bench.total(step(n, start=True, end=True), tenant="flood") for n in range(1001, 2000)]
            assert await asyncio.gather(*waiting, bench.total(step(1, start=True, end=True), tenant="other"))
            assert looks <= 2 * 1000 + 2

    run(scene())
