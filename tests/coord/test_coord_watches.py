"""Watchers of instances share the parsed view, and have places."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from mesh.cluster.mirror import Copy
from mesh.process.watched import Watched
from services.coord import instances as module
from services.coord.cluster import Cluster, cluster_of
from services.coord.instances import Instances
from shoal.errors import ResourceExhausted
from tests.breakable import PATIENCE_S


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
    monkeypatch.setattr(module, "_MAX_WATCHES", 6)
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
