"""Watchers of instances share the parsed view, and have places."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from grpc_health.v1 import health_pb2

from mesh.cluster.mirror import Copy
from mesh.process.watched import Watched
from services.coord import cluster as module
from services.coord import health as health_module
from services.coord import instances as instances_module
from services.coord.cluster import Cluster, cluster_of
from services.coord.health import MeshHealth, status_of
from services.coord.instances import Instances
from shoal.errors import ResourceExhausted
from tests.breakable import PATIENCE_S, until


class Keys:
    """The mirror of etcd's keys, without etcd."""

    def __init__(self) -> None:
        self.copies = Watched(Copy(stale=False))

    @property
    def copy(self) -> Copy:
        return self.copies.value

    def follow(self):
        return self.copies.follow()


def instances(keys: Keys) -> Instances:
    return Instances(cast("Any", None), cast("Any", keys))


async def test_a_change_is_parsed_once_for_all_watchers(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []

    def parse(copy: Copy) -> Cluster:
        parsed.append(copy.revision)
        return cluster_of(copy)

    monkeypatch.setattr(module, "cluster_of", parse)
    keys = Keys()
    found = instances(keys)
    watches = [found.watch("") for _ in range(50)]
    async with asyncio.timeout(PATIENCE_S):
        for watch in watches:
            assert (await anext(watch)).revision == 0
        following = [asyncio.ensure_future(anext(watch)) for watch in watches]
        await asyncio.sleep(0)
        keys.copies.set(Copy(revision=1, stale=True))
        assert {cluster.revision for cluster in await asyncio.gather(*following)} == {1}
    assert parsed == [0, 1]
    for watch in watches:
        await watch.aclose()


async def test_a_tenant_leaves_places_for_others_and_its_own_come_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances_module, "_MAX_WATCHES", 6)
    found = instances(Keys())
    watches = [found.watch("", "a") for _ in range(4)]
    for watch in watches:
        await anext(watch)
    with pytest.raises(ResourceExhausted):
        await anext(found.watch("", "a"))
    watches.append(found.watch(""))
    await anext(watches[-1])
    for watch in watches:
        await watch.aclose()
    assert found._places.taken == 0


async def test_watches_of_health_parse_a_change_once_and_take_turns_with_other_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def parse(copy: Copy) -> Cluster:
        order.append("p")
        return cluster_of(copy)

    def judge(*given: Any) -> int:
        order.append("w")
        return status_of(*given)

    monkeypatch.setattr(module, "cluster_of", parse)
    monkeypatch.setattr(health_module, "status_of", judge)
    keys = Keys()
    health = MeshHealth(cast("Any", keys), {"store": "store"})

    async def watch() -> None:
        async for _ in health.Watch(health_pb2.HealthCheckRequest(service="store"), cast("Any", None)):
            pass

    async def bystander() -> None:
        while True:
            order.append(" ")
            await asyncio.sleep(0)

    watches = [asyncio.create_task(watch()) for _ in range(50)]
    other = asyncio.create_task(bystander())
    await until(lambda: order.count("w") == 50, "they watch")
    keys.copies.set(Copy(revision=1, stale=False))
    await until(lambda: order.count("w") == 100, "they have noticed the change")
    assert order.count("p") == 2
    assert max(map(len, "".join(order).replace("p", "").split())) == 1
    for task in (*watches, other):
        task.cancel()
    await asyncio.wait([*watches, other], timeout=PATIENCE_S)
