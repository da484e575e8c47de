"""What every connector promises, on real brokers, with ingest as a real process that is killed.

At least once into the sink; exactly one job and one result for each message; nothing is settled before its answer is
durable, nor before what came before it; what has no answer goes to the dead letters and holds up nobody.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection

from shoal.inference.v2 import inference_pb2
from tests.breakable import until
from tests.ingest.connectors.brokers import Broker, Received, message, number
from tests.ingest.connectors.conftest import BROKERS, StartConnector
from tests.ingest.faults import FakeMesh, failing
from tests.long_form import by_form

pytestmark = [pytest.mark.mongo, pytest.mark.timeout(240)]
PATIENT = {"within_s": 90.0, "every_s": 0.2}
"""A broker may take half a session to let a member in, twice."""


async def mirror(request: Any, context: Any) -> inference_pb2.ModelInferResponse:
    """Answers with the request's own bytes, as a model's output."""
    data = request.raw_input_contents[0]
    response = inference_pb2.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    response.outputs.add(name="y", datatype="BYTES", shape=[1])
    response.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
    return response


async def slow(request: Any, context: Any) -> inference_pb2.ModelInferResponse:
    """The same, after a while: so that some are under way when something is killed."""
    await asyncio.sleep(0.05)
    return await mirror(request, context)


@pytest.fixture(autouse=True)
def _mirrors(own_mesh: FakeMesh) -> None:
    own_mesh.infer.model = mirror


@pytest.fixture
async def jobs(mongo_uri: str, mongo_database: str) -> AsyncIterator[AsyncCollection[Any]]:
    """ingest's collection of jobs."""
    async with AsyncMongoClient[dict[str, Any]](mongo_uri) as client:
        yield client[mongo_database]["jobs"]


async def answered(broker: Broker, numbers: Iterable[int]) -> list[Received]:
    """All answers, once there is one for each of the messages."""
    wanted = set(numbers)
    found: list[Received] = []

    async def complete() -> bool:
        found[:] = await broker.answers()
        return {number(each) for each in found} >= wanted

    await until(complete, "an answer to each message", **PATIENT)
    return found


async def settled(broker: Broker, count: int) -> None:
    async def is_so() -> bool:
        return await broker.settled() == count

    await until(is_so, f"{count} messages settled", **PATIENT)


async def one_result_each(
    own_mesh: FakeMesh, jobs: AsyncCollection[Any], answers: list[Received], numbers: Iterable[int]
) -> None:
    """Each message has one job and one result, and each copy of its answer is of that job."""
    documents = await jobs.find().to_list()
    results = own_mesh.store.results
    assert len(documents) == len(set(numbers)) == len(results)
    assert {document["_id"] for document in documents} == results.keys()
    by_message: defaultdict[int, set[str]] = defaultdict(set)
    for each in answers:
        by_message[number(each)].add(each.headers["shoal-job-id"])
        result = results[each.headers["shoal-job-id"]]
        assert result.response.SerializeToString() == each.value, "another job's answer"
    assert all(len(ids) == 1 for ids in by_message.values()), "a message has two results"
    assert set(by_message) == set(numbers)


async def test_each_message_is_answered_and_settled(
    broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh, jobs: AsyncCollection[Any]
) -> None:
    await broker.publish([message(n) for n in range(30)])
    start_connector(broker, labels={"team": "search"}, tenant="shop")
    answers = await answered(broker, range(30))
    await one_result_each(own_mesh, jobs, answers, range(30))
    await settled(broker, 30)
    one = await jobs.find_one({})
    assert one is not None
    assert one["tenant"] == "shop"
    assert one["model_name"] == "echo", "the connector's, whatever the message says"
    assert answers[0].headers.get("shoal-connector", "c") == "c"
    assert not await broker.dead()


# In the short form, `test_two_instances_share_a_stream_and_one_takes_over_what_the_other_had` kills under load, and
# `test_nothing_is_settled_before_what_came_before_it` restarts, for each broker.
@pytest.mark.parametrize("broker", by_form(["grpc", "pubsub"], ["grpc", *BROKERS]), indirect=True)
async def test_kills_leave_one_result_for_each_message(
    broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh, jobs: AsyncCollection[Any]
) -> None:
    own_mesh.infer.model = slow
    await broker.publish([message(n) for n in range(120)])
    for _ in range(by_form(2, 3)):
        before = len(own_mesh.store.results)
        process = start_connector(broker, max_in_flight=8)
        await until(lambda before=before: len(own_mesh.store.results) >= min(before + 20, 115), "some", **PATIENT)  # type: ignore[misc]
        process.kill()
    start_connector(broker)
    answers = await answered(broker, range(120))
    await settled(broker, 120)
    await one_result_each(own_mesh, jobs, answers, range(120))


async def test_nothing_is_settled_before_what_came_before_it(
    broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh, jobs: AsyncCollection[Any]
) -> None:
    go = asyncio.Event()

    async def first_waits(request: Any, context: Any) -> Any:
        if request.id in ("0", "1"):  # The first of each partition, where there are two.
            await go.wait()
        return await mirror(request, context)

    own_mesh.infer.model = first_waits
    await broker.publish([message(n) for n in range(20)])
    process = start_connector(broker)
    await answered(broker, range(2, 20))
    if broker.keeps_order:
        assert await broker.settled() == 0
    else:
        await settled(broker, 18)
    process.kill()
    start_connector(broker)
    go.set()
    answers = await answered(broker, range(20))
    await settled(broker, 20)
    await one_result_each(own_mesh, jobs, answers, range(20))


async def test_what_has_no_answer_goes_to_the_dead_letters_and_holds_up_nobody(
    broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh
) -> None:
    async def picky(request: Any, context: Any) -> Any:
        if request.id == "5":
            await failing(context, grpc.StatusCode.INVALID_ARGUMENT, "input 'x': no such shape")
        return await mirror(request, context)

    own_mesh.infer.model = picky
    values = [message(n) for n in range(10)]
    values[3] = b"\xff\xff no protobuf"
    await broker.publish(values)
    start_connector(broker)
    await answered(broker, {0, 1, 2, 4, 6, 7, 8, 9})
    await settled(broker, 10)
    dead = {each.value: each.headers for each in await broker.dead()}
    assert dead.keys() == {values[3], values[5]}, "as they came"
    assert dead[values[3]]["shoal-code"] == "INVALID_ARGUMENT"
    assert re.search("no serialised|model_name", dead[values[3]]["shoal-message"])
    assert "shoal-job-id" not in dead[values[3]]
    assert "input 'x': no such shape" in dead[values[5]]["shoal-message"]
    assert own_mesh.store.results[dead[values[5]]["shoal-job-id"]].message == "input 'x': no such shape"


# The window is the same for every broker; `test_kafka.py` reads on after a pause.
@pytest.mark.parametrize("broker", by_form(["grpc", "kafka"], ["grpc", *BROKERS]), indirect=True)
async def test_a_slow_model_holds_the_broker_back(
    broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh, jobs: AsyncCollection[Any]
) -> None:
    go = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await go.wait()
        return await mirror(request, context)

    own_mesh.infer.model = waits
    await broker.publish([message(n) for n in range(60)])
    start_connector(broker, max_in_flight=10)
    await until(lambda: sum(own_mesh.infer.calls.values()) >= 10, "a full window", **PATIENT)
    for _ in range(20):
        assert await jobs.count_documents({}) <= 10
    go.set()
    answers = await answered(broker, range(60))
    await one_result_each(own_mesh, jobs, answers, range(60))


# An outage stops every connector in the same way.
@pytest.mark.parametrize("broker", by_form(["grpc", "kafka"], ["grpc", *BROKERS]), indirect=True)
async def test_an_outage_of_everything_behind_ingest_loses_nothing(
    broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh, jobs: AsyncCollection[Any]
) -> None:
    await own_mesh.down()
    await broker.publish([message(n) for n in range(10)])
    start_connector(broker)

    async def all_queued() -> bool:
        return await jobs.count_documents({}) == 10

    await until(all_queued, "jobs", **PATIENT)
    assert await broker.settled() == 0
    await own_mesh.up()
    answers = await answered(broker, range(10))
    await settled(broker, 10)
    await one_result_each(own_mesh, jobs, answers, range(10))


# A message has its job by its place, and each broker's places are those of the tests above.
@pytest.mark.parametrize("real_broker", by_form(["kinesis"], BROKERS), indirect=True)
async def test_a_message_keeps_its_job_when_the_connector_is_set_up_otherwise(
    real_broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh, jobs: AsyncCollection[Any]
) -> None:
    go = asyncio.Event()

    async def waits(request: Any, context: Any) -> Any:
        await go.wait()
        return await mirror(request, context)

    own_mesh.infer.model = waits
    await real_broker.publish([message(0)])
    process = start_connector(real_broker)
    await until(lambda: sum(own_mesh.infer.calls.values()) >= 1, "the call", **PATIENT)
    process.kill()
    start_connector(real_broker, labels={"now": "another request"})
    go.set()
    answers = await answered(real_broker, [0])
    await settled(real_broker, 1)
    await one_result_each(own_mesh, jobs, answers, [0])
    assert not await real_broker.dead()


async def test_two_instances_share_a_stream_and_one_takes_over_what_the_other_had(
    real_broker: Broker, start_connector: StartConnector, own_mesh: FakeMesh, jobs: AsyncCollection[Any]
) -> None:
    own_mesh.infer.model = slow
    one, two = (start_connector(real_broker, n, max_in_flight=4) for n in range(2))
    await one.until_ready()
    await two.until_ready()
    await real_broker.publish([message(n) for n in range(100)])
    await until(lambda: len(own_mesh.store.results) >= 30, "some", **PATIENT)
    one.kill()
    answers = await answered(real_broker, range(100))
    await settled(real_broker, 100)
    await one_result_each(own_mesh, jobs, answers, range(100))
