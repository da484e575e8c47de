"""A service in a cluster: it enforces the policy in etcd, and refuses every caller until it knows one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from mesh.cluster.etcd import Entry
from mesh.cluster.mirror import Copy
from mesh.process.watched import Watched
from mesh.rpc.access import Access
from mesh.rpc.cluster_access import PolicyWatch
from shoal.access import cluster
from shoal.access.caller_header import LAUNCHER
from shoal.access.policy import parse
from shoal.access.rpc_groups import INDEX
from tests.breakable import until

DOCUMENT = "{version: 1, issuers: [{issuer: shoal, audiences: [shoal], token_prefix: shoal_, cluster: true}]}"


class Etcd:
    """Mirror whose copy the test sets."""

    def __init__(self) -> None:
        self.copies = Watched(Copy())

    async def follow(self) -> AsyncIterator[Copy]:
        async with aclosing(self.copies.follow()) as copies:
            async for copy in copies:
                yield copy

    def set(self, revision: int, values: dict[bytes, bytes]) -> None:
        entries = {key: Entry(key, value, 1, revision, 0) for key, value in values.items()}
        self.copies.set(Copy(entries, revision, stale=False))


async def test_a_policy_is_in_force_with_its_revision_and_survives_outages_and_invalid_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    etcd, access = Etcd(), Access(None)
    applied: list[object] = []
    access.set_policy = applied.append  # type: ignore[method-assign]
    async with PolicyWatch(etcd, access) as watch:  # type: ignore[arg-type]
        assert not watch.in_force.value.is_known
        etcd.set(5, {b"/shoal/instances/x": b"1"})
        await until(lambda: watch.in_force.value.is_known, "etcd has no policy")
        assert watch.in_force.value.policy is None
        etcd.set(7, {cluster.POLICY: cluster.policy_value(1, parse(DOCUMENT))})
        await until(lambda: watch.in_force.value.revision == 7, "the policy is in force")
        etcd.set(8, {cluster.POLICY: cluster.policy_value(1, parse(DOCUMENT))})
        await until(lambda: watch.in_force.value.revision == 8, "the same policy is in force at a later revision")
        etcd.copies.set(replace(etcd.copies.value, stale=True))
        etcd.set(9, {cluster.POLICY: b"{}"})
        await until(lambda: "cannot be read" in caplog.text, "an invalid policy was seen")
        etcd.set(10, {cluster.POLICY: b"{}"})
        for _ in range(10):
            await asyncio.sleep(0)
        assert watch.in_force.value.revision == 8, "it is not in force when it is written again"
        etcd.set(11, {cluster.POLICY: cluster.policy_value(2, parse(DOCUMENT))})
        await until(lambda: watch.in_force.value.revision == 11, "the next policy is in force")
    assert len(applied) == 2
    assert access.check(INDEX, LAUNCHER) is None
