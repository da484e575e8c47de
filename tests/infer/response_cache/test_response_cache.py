"""The response cache: what is one request and what is two, who leaves a flight, what is kept and for how long."""

from __future__ import annotations

import asyncio
import gc
import weakref

import numpy as np
import pytest

from services.infer.requests.signature import Signature
from services.infer.response_cache.cache import CacheState, ttl_s
from services.infer.response_cache.key import ResponseKeys
from services.infer.response_cache.store import ResponseStore, frozen, size_bytes
from shoal.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.model_config_pb2 import ModelConfig
from tests.infer.conftest import request
from tests.infer.response_cache.cached_model import ANY, Bench, floats, read, settle

HIT, MISS, SHARED = CacheState.HIT, CacheState.MISS, CacheState.SHARED
KEYS = ResponseKeys("m", 1, "d", ModelConfig(), Signature(ANY, ANY))


def key(asked: pb.ModelInferRequest, keys: ResponseKeys = KEYS) -> bytes:
    return keys.key(read(asked), asked.parameters)


def of_outputs(asked: pb.ModelInferRequest, *names: str, classes: int = 0) -> pb.ModelInferRequest:
    for name in names:
        output = asked.outputs.add(name=name)
        if classes:
            output.parameters["classification"].int64_param = classes
    return asked


def text(*parts: bytes) -> pb.ModelInferRequest:
    return request("m", s=np.array(parts, object))


def integers(*shape: int) -> pb.ModelInferRequest:
    return request("m", n=np.full(shape, 0x3F800000, np.int32))  # The bytes of 1.0.


DIFFERENT = {
    "the shape": [floats(2, 3), floats(3, 2), floats(1, 6), floats(6, 1), integers(2, 3)],
    "emptiness": [floats(0, 3), floats(3, 0), floats(0, 0)],
    "one bit": [floats(1, 2), floats(1, 2, value=np.nextafter(np.float32(1), np.float32(2)))],
    "zero's sign": [floats(1, 1, value=0.0), floats(1, 1, value=-0.0)],
    "where text is cut": [text(b"ab", b"c"), text(b"a", b"bc"), text(b"abc", b""), text(b"abc")],
    "text that looks like a length": [text(b"\1\0\0\0a"), text(b"a"), text(b"\1\0\0\0", b"a")],
    "outputs": [
        floats(1, 2),
        of_outputs(floats(1, 2), "x", classes=1),
        of_outputs(floats(1, 2), "x", classes=2),
        floats(1, 2, mine="a"),
        floats(1, 2, mine="b"),
        floats(1, 2, mine=1),
        floats(1, 2, mine=True),
        floats(1, 2, other="a"),
        floats(1, 2, sequence_id=1),
    ],
}


@pytest.mark.parametrize("requests", DIFFERENT.values(), ids=DIFFERENT)
def test_any_difference_gives_another_key(requests):
    assert len({key(asked) for asked in requests}) == len(requests)


def test_scheduling_parameters_do_not_change_the_key():
    same = [floats(2, 2), floats(2, 2, timeout=5), floats(2, 2, priority=3), floats(2, 2, explain=True)]
    typed = pb.ModelInferRequest(model_name="m", id="another")
    typed.inputs.add(name="x", datatype="FP32", shape=[2, 2]).contents.fp32_contents.extend([1] * 4)
    assert len({key(asked) for asked in [*same, typed, of_outputs(floats(2, 2), "x")]}) == 1


async def test_many_callers_of_a_run_go_on_a_few_in_each_iteration():
    bench = Bench()
    asked = [bench.ask(floats(1, 1)) for _ in range(1000)]
    await settle()
    assert len(bench.runs.all) == 1
    bench.runs.finish()
    before, steps = 0, 0
    while before < len(asked):
        await asyncio.sleep(0)
        done = sum(task.done() for task in asked)
        assert done - before <= 64
        before, steps = done, steps + 1
        assert steps < 1000
    assert [task.result()[1] for task in asked].count(SHARED) == 999


def test_every_model_version_and_configuration_has_its_own_keys():
    signature = Signature(ANY, ANY)
    made = [
        ResponseKeys(name, version, digest, ModelConfig(max_batch_size=rows), signature)
        for name, version, digest, rows in [("m", 1, "d", 0), ("m", 2, "d", 0), ("m", 1, "e", 0), ("m", 1, "d", 8)]
    ]
    assert len({key(floats(1, 1), keys) for keys in made}) == 4


async def test_a_repeated_request_is_a_hit():
    bench = Bench()
    first = bench.ask(floats(2, 3))
    await settle()
    bench.runs.finish()
    result, state = await first
    assert state is MISS
    again, state = await bench.ask(floats(2, 3))
    assert state is HIT
    np.testing.assert_array_equal(again.outputs[0], result.outputs[0])
    assert (again.times.rows, again.queue_ns, again.fired) == (0, 0, "cache")
    other = bench.ask(floats(3, 2))  # The same bytes: this is where Triton returns a [2, 3].
    await settle()
    bench.runs.finish()
    result, state = await other
    assert (state, result.outputs[0].shape) == (MISS, (3, 2))
    told = bench.statistics
    assert (told.cache_hit.count, told.cache_miss.count, told.success.count, told.queue.count) == (1, 2, 1, 1)


async def test_identical_requests_in_flight_run_once():
    bench = Bench()
    asked = [bench.ask(floats(1, 4)) for _ in range(20)]
    await settle()
    assert len(bench.runs.all) == 1
    bench.runs.finish()
    results = await asyncio.gather(*asked)
    assert [state for _, state in results] == [MISS, *[SHARED] * 19]
    assert {result.outputs[0].tolist()[0][0] for result, _ in results} == {-1.0}
    told = bench.statistics
    assert (told.cache_hit.count, told.cache_miss.count) == (19, 1)


async def test_tenants_share_neither_answers_nor_flights():
    bench = Bench()
    asked = [bench.ask(floats(1, 4), tenant=tenant) for tenant in ("blue", "red", "", "blue")]
    await settle()
    assert [run.tenant for run in bench.runs.all] == ["blue", "red", ""]
    for _ in range(3):
        bench.runs.finish()
    assert [state for _, state in await asyncio.gather(*asked)] == [MISS, MISS, MISS, SHARED]
    assert (await bench.ask(floats(1, 4), tenant="blue"))[1] is HIT
    green = bench.ask(floats(1, 4), tenant="green")
    await settle()
    bench.runs.finish()
    assert (await green)[1] is MISS


async def test_a_request_waits_only_for_one_of_its_own_priority():
    bench = Bench()
    low, high, low_too = (bench.ask(floats(1, 4, priority=priority)) for priority in (3, 1, 3))
    await settle()
    assert [run.request.parameters.priority for run in bench.runs.all] == [3, 1]
    bench.runs.finish(bench.runs.all[1])
    assert (await high)[1] is MISS
    assert not low.done()
    assert (await bench.ask(floats(1, 4)))[1] is HIT
    bench.runs.finish()
    assert [(await low)[1], (await low_too)[1]] == [MISS, SHARED]


async def test_a_request_of_a_model_waits_for_no_other():
    bench = Bench()
    asked = [bench.ask(floats(1, 4), inner_call=inner_call) for inner_call in (None, object(), object(), None)]
    await settle()
    assert len(bench.runs.all) == 3
    for _ in range(3):
        bench.runs.finish()
    assert [state for _, state in await asyncio.gather(*asked)] == [MISS, MISS, MISS, SHARED]
    assert (await bench.ask(floats(1, 4), inner_call=object()))[1] is HIT


async def test_callers_that_leave_a_flight_or_expire_in_it_are_counted_once_each():
    bench = Bench()
    asked = [bench.ask(floats(1, 4)) for _ in range(4)]
    late = bench.ask(floats(1, 4), bench.clock() + 0.01)
    await settle()
    bench.clock.now += 1
    with pytest.raises(DeadlineExceeded):
        await late
    for task in asked[:3]:
        task.cancel()
    await settle()
    assert (bench.statistics.cancelled, bench.statistics.expired) == (3, 1)
    bench.runs.finish()
    assert (await asked[3])[1] is MISS


async def test_a_caller_that_leaves_does_not_affect_the_others():
    bench = Bench()
    leader, *others = (bench.ask(floats(1, 4)) for _ in range(4))
    await settle()
    leader.cancel()
    others[0].cancel()
    await settle()
    assert [run.is_abandoned for run in bench.runs.all] == [False]
    bench.runs.finish()
    # One follower takes the leader's place and counts the execution, once.
    assert sorted(state for _, state in await asyncio.gather(*others[1:])) == [MISS, SHARED]
    assert (bench.statistics.cache_hit.count, bench.statistics.cache_miss.count) == (1, 1)
    assert (await bench.ask(floats(1, 4)))[1] is HIT


async def test_a_flight_without_callers_is_cancelled():
    bench = Bench()
    asked = [bench.ask(floats(1, 4)) for _ in range(3)]
    await settle()
    for task in asked:
        task.cancel()
    await settle()
    assert [run.is_abandoned for run in bench.runs.all] == [True]
    late = bench.ask(floats(1, 4))
    await settle()
    assert len(bench.runs.open) == 1
    bench.runs.finish()
    assert (await late)[1] is MISS


async def test_an_expired_leader_does_not_fail_the_others():
    bench = Bench()
    leader, *others = (bench.ask(floats(1, 4)) for _ in range(3))
    await settle()
    bench.runs.finish(error=DeadlineExceeded("in the queue"))
    with pytest.raises(DeadlineExceeded):
        await leader
    await settle()
    assert len(bench.runs.open) == 1  # The others run once more, together.
    bench.runs.finish()
    assert sorted(state for _, state in await asyncio.gather(*others)) == [MISS, SHARED]


async def test_the_requests_own_error_reaches_all_callers_and_is_not_stored():
    bench = Bench()
    asked = [bench.ask(floats(1, 4)) for _ in range(3)]
    await settle()
    bench.runs.finish(error=Internal("the model raised"))
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(error) for error in errors] == ["the model raised"] * 3
    assert len({id(error) for error in errors}) == 3
    assert len(bench.runs.all) == 1
    again = bench.ask(floats(1, 4))
    await settle()
    bench.runs.finish()
    assert (await again)[1] is MISS


async def test_repeated_failures_of_flights_do_not_delay_a_request_further():
    bench = Bench()
    asked = [bench.ask(floats(1, 4)) for _ in range(6)]
    for _ in range(2):
        await settle()
        assert len(bench.runs.open) == 1
        bench.runs.finish(error=ResourceExhausted("full"))
    await settle()
    assert len(bench.runs.open) == 4  # Two have led and failed; now each for itself.
    while bench.runs.open:
        bench.runs.finish()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(ResourceExhausted) == 2


async def test_a_follower_expires_before_the_execution_has_begun():
    bench = Bench()
    leader = bench.ask(floats(1, 4))
    await settle()
    follower = bench.ask(floats(1, 4), deadline=bench.clock.now + 0.005)
    await settle()
    bench.clock.now += 0.01
    with pytest.raises(DeadlineExceeded):
        await follower
    # Begun in time is completed, however long it takes: as a call of one's own would be.
    bench.runs.open[0].is_waiting = False
    patient = bench.ask(floats(1, 4, timeout=1))
    await settle()
    bench.clock.now += 10
    await settle()
    bench.runs.finish()
    assert [(await task)[1] for task in (leader, patient)] == [MISS, SHARED]


async def test_a_response_expires_after_its_ttl():
    bench = Bench(ttl_s=10)
    first = bench.ask(floats(1, 4))
    await settle()
    bench.clock.now += 5  # Counted from the result.
    bench.runs.finish()
    await first
    bench.clock.now += 9.999
    assert (await bench.ask(floats(1, 4)))[1] is HIT
    bench.clock.now += 0.001
    late = bench.ask(floats(1, 4))
    await settle()
    assert len(bench.store) == 0
    bench.runs.finish()
    assert (await late)[1] is MISS


async def test_stored_outputs_are_read_only_and_hold_no_batch():
    bench = Bench()
    asked = bench.ask(floats(1, 4))
    await settle()
    bench.runs.finish()
    result, _ = await asked
    [kept] = result.outputs
    assert kept.base is None
    with pytest.raises(ValueError, match="read-only"):
        kept[0, 0] = 9


def test_frozen_lets_the_batch_go():
    batch = np.zeros((1000, 1000), np.float32)
    seen = weakref.ref(batch)
    [kept] = frozen([batch[3:4]])
    del batch
    gc.collect()
    assert seen() is None
    assert kept.nbytes == 4000


def test_elements_that_can_be_changed_are_copied():
    mutable = bytearray(b"abc")
    given = np.empty(2, object)
    given[:] = [mutable, "text"]
    [kept] = frozen([given])
    mutable[0] = 0
    assert kept.tolist() == [b"abc", "text"]


def test_the_size_of_text_includes_its_elements():
    words = np.array(["x" * 1000, "é" * 1000, "🐟" * 1000, b"y" * 1000], object)
    assert size_bytes([words]) > 4 * 8 + 1000 + 2 * 1000 + 4 * 1000 + 1000
    few, many = np.array([b""] * 10, object), np.array([b""] * 1000, object)
    assert size_bytes([many]) - size_bytes([few]) >= 990 * (8 + 33)


def test_outputs_larger_than_their_share_are_not_stored():
    store = ResponseStore(80_000)
    owner = store.owner()
    assert store.put(owner, b"small", [np.zeros(1000)])
    assert not store.put(owner, b"large", [np.zeros(1300)])
    assert len(store) == 1
    assert not ResponseStore(0).put(1, b"k", [np.zeros(1)])


async def test_a_large_response_is_returned_but_not_stored():
    bench = Bench(limit_bytes=10_000)
    asked = [bench.ask(floats(100, 100)) for _ in range(2)]
    await settle()
    bench.runs.finish()
    assert [state for _, state in await asyncio.gather(*asked)] == [MISS, SHARED]
    assert len(bench.store) == 0


async def test_closing_drops_its_own_outputs_only():
    bench = Bench()
    stranger = bench.store.owner()
    assert bench.store.put(stranger, b"k", [np.zeros(1)])
    async with bench.cache:
        asked = bench.ask(floats(1, 4))
        await settle()
        bench.runs.finish()
        await asked
        assert len(bench.store) == 2
    assert len(bench.store) == 1
    assert bench.store.get(stranger, b"k", 0.0) is not None


def test_a_result_after_the_unload_is_not_stored():
    store = ResponseStore()
    owner = store.owner()
    store.drop(owner)
    assert not store.put(owner, b"k", [np.zeros(1)])
    assert (len(store), store.size_bytes) == (0, 0)


def config(ttl: str | None = None, **more: object) -> ModelConfig:
    made = ModelConfig(response_cache={"enable": True}, **more)
    if ttl is not None:
        made.parameters["response_cache_ttl_ms"].string_value = ttl
    return made


def test_the_time_to_live_is_read():
    assert ttl_s(ModelConfig()) is None
    assert ttl_s(config()) == float("inf")
    assert ttl_s(config(" 1500 ")) == 1.5


@pytest.mark.parametrize("ttl", ["0", "-1", "1.5", "soon", "1" * 13, "٣"])
def test_a_wrong_time_to_live_is_named(ttl):
    with pytest.raises(FailedPrecondition, match="response_cache_ttl_ms"):
        ttl_s(config(ttl))


def test_models_that_cannot_be_cached_are_rejected_by_name():
    with pytest.raises(FailedPrecondition, match=r"response_cache\.enable with sequence_batching"):
        ttl_s(config(sequence_batching={}))
    with pytest.raises(FailedPrecondition, match=r"response_cache\.enable with .*decoupled"):
        ttl_s(config(model_transaction_policy={"decoupled": True}))
