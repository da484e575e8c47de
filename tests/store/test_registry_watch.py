"""Watchers of the registry share its reads, and have places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest

from services.store.registry.registry import Registry, Version
from services.store.registry.registry_watch import RegistryWatch
from shoal.errors import ResourceExhausted
from tests.breakable import PATIENCE_S, until


class Reads:
    """A registry without models, whose reads are counted and wait for `may_end`."""

    def __init__(self) -> None:
        self.count = 0
        self.may_end = asyncio.Event()

    async def versions(self, name: str) -> Sequence[Version]:
        self.count += 1
        await self.may_end.wait()
        return ()


def watching(reads: Reads, max_watches: int) -> RegistryWatch:
    return RegistryWatch(cast("Any", None), cast("Registry", reads), max_watches)


async def opened(watch: RegistryWatch, tenant: str | None = None) -> AsyncGenerator[tuple[Version, ...], None]:
    stream = watch.follow("", tenant)
    assert await anext(stream) == ()
    return stream


async def test_watchers_that_begin_during_a_read_share_the_next_one() -> None:
    reads, most = Reads(), 100
    watch = watching(reads, most)
    opening = [asyncio.create_task(opened(watch)) for _ in range(most)]
    await until(lambda: watch._of_others.taken == most, "all have begun")
    assert reads.count == 1
    reads.may_end.set()
    async with asyncio.timeout(PATIENCE_S):
        streams = await asyncio.gather(*opening)
    assert reads.count == 2
    for stream in streams:
        await stream.aclose()


async def test_a_tenant_takes_no_watch_of_others_and_its_places_come_free() -> None:
    reads = Reads()
    reads.may_end.set()
    watch = watching(reads, 6)
    streams = [await opened(watch, "a") for _ in range(4)]
    with pytest.raises(ResourceExhausted):
        await opened(watch, "a")
    others = [await opened(watch, "b"), await opened(watch, "c"), *[await opened(watch) for _ in range(6)]]
    with pytest.raises(ResourceExhausted):
        await opened(watch)
    for stream in (*streams, *others):
        await stream.aclose()
    for _ in range(20):
        stream = await opened(watch, "a")
        await stream.aclose()
    assert (watch._of_tenants.taken, watch._of_others.taken) == (0, 0)
