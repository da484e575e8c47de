"""A coord with authentication gives an Envoy no configuration before it knows the gateway's part of the policy."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

from mesh.cluster.mirror import Copy
from mesh.process.watched import Watched
from mesh.rpc.access import Access
from mesh.rpc.cluster_access import InForce, PolicyWatch
from mesh.xds.extensions import gateway_access
from mesh.xds.resource import EXTENSION
from mesh.xds.snapshot import EnvoyNode
from services.coord.configurations import Configurations
from services.coord.gateway_policy import GatewayPolicy
from services.coord.traffic import AT_GATEWAY, table
from shoal.access import tokens
from tests.access.policies import policy
from tests.breakable import until

NODE = EnvoyNode("local", "127.0.0.1:1", "/run/x.sock")


class Mirror:
    """Mirror of a cluster without instances."""

    def __init__(self) -> None:
        self.copy = Copy(revision=1, stale=False)

    async def after(self, seen: Copy, timeout_s: float | None = None) -> Copy:
        await asyncio.Event().wait()
        return self.copy


async def test_an_envoy_keeps_what_it_has_until_a_restarted_coord_has_read_the_policy(tmp_path: Path) -> None:
    mirror: Any = Mirror()
    watch = PolicyWatch(mirror, Access(None))
    expected = policy(tokens.create_signer(tmp_path / "s.json"))
    async with (
        GatewayPolicy(watch, AT_GATEWAY) as gateway,
        Configurations(mirror, table(), None, settle_s=0, access=gateway.access) as configurations,
        aclosing(configurations.follow(NODE)) as snapshots,  # type: ignore[type-var]
    ):
        first = asyncio.ensure_future(anext(snapshots))
        await until(lambda: configurations._inputs.value.presence.is_known, "the cluster is known")
        await asyncio.sleep(0)
        assert not first.done()
        watch.in_force.set(InForce(expected, 3, 9, is_known=True))
        resources = (await first).of(EXTENSION)
        assert {*resources.values()} == {*gateway_access(expected, AT_GATEWAY).extensions}


async def test_a_cluster_without_a_policy_has_a_closed_gateway() -> None:
    mirror: Any = Mirror()
    watch = PolicyWatch(mirror, Access(None))
    watch.in_force = Watched(InForce(is_known=True))
    async with GatewayPolicy(watch, AT_GATEWAY) as gateway:
        await until(lambda: gateway.access.value is not None, "the gateway is closed")
    assert gateway.access.value == gateway_access(None, AT_GATEWAY)
