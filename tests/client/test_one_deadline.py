"""A method of the client that makes several calls has one deadline for all of them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

import shoal
from shoal.client.jobs import jobs
from shoal.client.models import readiness
from shoal.client.transport import methods
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import DeadlineExceeded
from shoal.inference.v2 import inference_pb2 as oip
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store
from tests.client.served import Served
from tests.client.transport.test_calls import World

Ask = Callable[[shoal.AsyncClient], Coroutine[Any, Any, Any]]

LISTS: dict[str, tuple[methods.Method[Any, Any], Ask]] = {
    "jobs": (methods.LIST_JOBS, lambda client: client.jobs.list(timeout=1_000)),
    "batches": (methods.LIST_BATCHES, lambda client: client.batches.list(timeout=1_000)),
    "dead letters": (methods.LIST_DEAD_LETTERS, lambda client: client.jobs.dead.list(timeout=1_000)),
    "tenants": (methods.LIST_TENANTS, lambda client: client.tenants.list(timeout=1_000)),
    "results": (methods.QUERY_RESULTS, lambda client: client.results.list(timeout=1_000)),
    "usage": (methods.LIST_USAGE, lambda client: client.store.usage(timeout=1_000)),
}


def hundreds(left_s: float) -> int:
    """The hundreds of seconds that a call had left: up to 80 s pass on the way, and grpc.aio adds up to one percent."""
    return round((left_s + 35) / 100)


class Slow:
    """Behaviours that take seconds of the client's clock, and note how much time each call had left."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.world = World()
        self.left: list[tuple[str, float]] = []

    def client(self) -> shoal.AsyncClient:
        client = shoal.AsyncClient(self.served.address)
        client._caller.clock = self.world.clock
        return client

    def on(self, method: Any, seconds: float, answer: Callable[[], Any]) -> None:
        async def behaviour(request: Any, context: Any) -> Any:
            self.left.append((method.name, context.time_remaining()))
            self.world.now += seconds
            if (made := answer()) is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, "not there")
            return made

        self.served.on(method, behaviour)


@pytest.mark.parametrize("name", LISTS)
async def test_the_pages_of_a_list_share_its_deadline(served: Served, name: str) -> None:
    method, ask = LISTS[name]
    slow = Slow(served)
    pages = [method.response(next_page_token=token) for token in ("a", "b", "c", "d", "")]
    slow.on(method, 400, lambda: pages.pop(0))
    async with slow.client() as client:
        with pytest.raises(DeadlineExceeded, match="no response within 1000 s"):
            await ask(client)
    assert [hundreds(left) for _, left in slow.left] == [10, 6, 2]


async def test_a_wait_for_a_result_has_one_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "READ_S", 100 * jobs.READ_S)
    slow = Slow(served)
    ended = ingest.Job(id="a", state=ingest.JOB_STATE_SUCCEEDED)
    answers = [None, store.GetResultResponse(result=store.Result(outcome=store.Result.OUTCOME_SUCCEEDED))]
    slow.on(methods.GET_RESULT, 300, lambda: answers.pop(0))

    async def watch(request: Any, context: Any) -> Any:
        slow.left.append(("WatchJob", context.time_remaining()))
        slow.world.now += 300
        yield ingest.WatchJobResponse(job=ended)

    served.on(methods.WATCH_JOB, watch, "unary_stream")
    async with slow.client() as client:
        await client.jobs.result("a", timeout=800)
    assert [(name, hundreds(left)) for name, left in slow.left] == [
        ("GetResult", 8),
        ("WatchJob", 5),
        ("GetResult", 2),
    ]


async def test_without_a_timeout_a_result_is_waited_for(served: Served) -> None:
    slow = Slow(served)
    answers = [None, store.GetResultResponse(result=store.Result(outcome=store.Result.OUTCOME_SUCCEEDED))]
    slow.on(methods.GET_RESULT, 300, lambda: answers.pop(0))
    left: list[float | None] = []

    async def watch(request: Any, context: Any) -> Any:
        left.append(context.time_remaining())
        yield ingest.WatchJobResponse(job=ingest.Job(id="a", state=ingest.JOB_STATE_SUCCEEDED))

    served.on(methods.WATCH_JOB, watch, "unary_stream")
    async with slow.client() as client:
        await client.jobs.result("a", timeout=None)
    assert left == [None]


async def test_the_parts_of_the_status_share_its_deadline(served: Served) -> None:
    slow = Slow(served)
    instances = [coord.Instance(service="ingest", name="ingest-0")]
    slow.on(methods.LIST_INSTANCES, 100, lambda: coord.ListInstancesResponse(instances=instances))
    slow.on(methods.GET_LEADER, 100, coord.GetLeaderResponse)
    slow.on(methods.LIST_MODELS, 100, store.ListModelsResponse)
    slow.on(methods.GET_MESH_STATUS, 100, coord.GetMeshStatusResponse)
    slow.on(methods.LIST_CONNECTORS, 100, ingest.ListConnectorsResponse)
    async with slow.client() as client:
        await client.status(timeout=600)
    assert slow.left[4][0] == "ListConnectors"
    assert hundreds(slow.left[4][1]) == 2


async def test_a_poll_for_readiness_has_one_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "POLL_TIMEOUT_S", 100 * readiness.POLL_TIMEOUT_S)
    slow = Slow(served)
    instances = [coord.Instance(service="infer", name="infer-0", state=coord.INSTANCE_STATE_READY)]
    slow.on(methods.LIST_INSTANCES, 400, lambda: coord.ListInstancesResponse(instances=instances))
    slow.on(methods.REPOSITORY_INDEX, 400, oip.RepositoryIndexResponse)
    async with slow.client() as client:
        with pytest.raises(DeadlineExceeded, match=r"not ready everywhere after 600 s: m: not on infer-0"):
            await client.models.wait_ready("m", timeout=600)
    assert [(name, hundreds(left)) for name, left in slow.left] == [("ListInstances", 5), ("RepositoryIndex", 1)]
