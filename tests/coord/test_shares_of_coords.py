"""Shares of limits while coords are killed or frozen, and etcd freezes: real processes, two claimants at each coord."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from mesh import keyring
from mesh.cluster.etcd import Etcd
from mesh.rpc.channel import connect
from mesh.rpc.share_messages import request_message, shares_in
from services.coord.share_claims import _TIMEOUT_S
from shoal.access.caller_header import AS_SERVICE
from shoal.access.limits import Bucket, Kind
from shoal.coord.v1 import coord_pb2, coord_pb2_grpc, shares_pb2_grpc
from tests.breakable import EtcdProcess, until
from tests.coord.conftest import Coord
from tests.coord.test_coord_access import Access, document

LIMITS = {
    Kind.REQUESTS: ("requests_per_second", 100),
    Kind.IN_FLIGHT: ("requests_in_flight", 12),
    Kind.BYTES: ("bytes_per_second", 1e6),
    Kind.ROWS: ("rows_per_second", 0.5),
}
WHOLE = {kind: number for kind, (_, number) in LIMITS.items()}
BUCKETS = {kind: Bucket("plan", kind, "acme") for kind in LIMITS}
# A claim waits for a frozen leader for so long, and then for the coord itself.
PATIENCE_S = 20 * _TIMEOUT_S

Held = dict[Kind, float]


class Claimant:
    """A process that counts calls, whose callers want more than there is. It claims at one coord."""

    def __init__(self, name: str, channel: grpc.aio.Channel) -> None:
        self._name = name
        self._stub = shares_pb2_grpc.ShareServiceStub(channel)
        self.held: Held = {}

    async def claim(self) -> None:
        """Renew the shares; keep the last ones when coord does not answer."""
        held = {BUCKETS[kind]: share for kind, share in self.held.items()}
        request = request_message(self._name, dict.fromkeys(BUCKETS.values(), 1e6), held)
        try:
            response = await self._stub.ClaimShares(request, timeout=PATIENCE_S, metadata=AS_SERVICE)
        except grpc.aio.AioRpcError:
            return
        shares = shares_in(response)
        self.held = {kind: shares[bucket].amount for kind, bucket in BUCKETS.items()}


class Cluster:
    """Two coords that share an etcd."""

    def __init__(self, folder: Path, etcd: EtcdProcess, coords: list[Coord], channels: list[grpc.aio.Channel]) -> None:
        self.etcd = etcd
        self.coords = coords
        self._channels = channels
        self.at = [[Claimant(f"n{n}/infer-{k}", channel) for k in range(2)] for n, channel in enumerate(channels)]

    @property
    def claimants(self) -> list[Claimant]:
        return [one for of_coord in self.at for one in of_coord]

    async def leader(self, asked: int) -> int | None:
        """Return the number of the coord that leads, as another one knows it."""
        try:
            response = await coord_pb2_grpc.CoordServiceStub(self._channels[asked]).GetLeader(
                coord_pb2.GetLeaderRequest(), timeout=PATIENCE_S, metadata=AS_SERVICE
            )
        except grpc.aio.AioRpcError:
            return None
        names = [coord.name for coord in self.coords]
        return names.index(response.instance) if response.instance in names else None

    async def round(self, *away: int) -> Held:
        """Let the claimants claim, one after the other, but those at the coords `away`; return what all hold.

        Nobody has nothing, and after each claim all together have at most twice each limit: once for each coord.
        """
        for number, of_coord in enumerate(self.at):
            for one in () if number in away else of_coord:
                await one.claim()
                together = self.together()
                assert all(together[kind] <= 2 * whole * (1 + 1e-9) for kind, whole in WHOLE.items()), together
        assert all(one.held and min(one.held.values()) > 0 for one in self.claimants)
        return self.together()

    def together(self) -> Held:
        return {kind: sum(one.held.get(kind, 0.0) for one in self.claimants) for kind in WHOLE}

    async def until_shared(self, *away: int) -> None:
        """Wait until the claimants hold each limit together, and no more."""

        async def is_shared() -> bool:
            return await self.round(*away) == pytest.approx(WHOLE)

        await until(is_shared, "the shares sum to the limits", every_s=0.2)


@pytest.fixture
async def cluster(run_dir: Path) -> AsyncIterator[Cluster]:
    master = run_dir / "master.key"
    master.write_text(keyring.new_master())
    master.chmod(0o600)
    async with AsyncExitStack() as stack:
        etcd = stack.enter_context(EtcdProcess(run_dir))
        await etcd.until_ready()
        settings = {"AUTH": "true", "MASTER_KEY": str(master)}
        coords = [stack.enter_context(Coord(run_dir, number, etcd.address, **settings)) for number in range(2)]
        for coord in coords:
            await coord.until_ready()
        channels = [await stack.enter_async_context(connect(f"unix:{coord.socket}")) for coord in coords]
        access = Access(channels[0], await stack.enter_async_context(Etcd(etcd.address)), master)
        await access.begin()
        limit = {"name": "plan", **dict(LIMITS.values())}
        await access.apply(document(limits=json.dumps([limit])))
        made = Cluster(run_dir, etcd, coords, channels)

        async def have_limits() -> bool:
            for one in made.claimants:
                await one.claim()
            return all(one.held for one in made.claimants) and await made.leader(0) is not None

        await until(have_limits, "the coords know the limits")
        await made.until_shared()
        yield made


@pytest.mark.parametrize("way", ["kill", "freeze"])
async def test_shares_while_the_leader_is_away_and_when_it_is_back(cluster: Cluster, way: str) -> None:
    first = await cluster.leader(0)
    assert first is not None
    other, coord = 1 - first, cluster.coords[first]
    getattr(coord, way)()
    kept = {kind: sum(one.held[kind] for one in cluster.at[first]) for kind in WHOLE}

    async def leads() -> bool:
        together = await cluster.round(first)
        # The claimants of the coord that is left share the limits, and the others keep what they had.
        assert all(together[kind] <= (whole + kept[kind]) * (1 + 1e-9) for kind, whole in WHOLE.items()), together
        return await cluster.leader(other) == other

    await until(leads, "the other coord leads")
    if way == "kill":
        coord.start()
        await coord.until_ready()
    else:
        coord.thaw()
    await cluster.until_shared()


async def test_shares_while_the_coord_that_does_not_lead_is_away_and_when_it_is_back(cluster: Cluster) -> None:
    leader = await cluster.leader(0)
    assert leader is not None
    other = 1 - leader
    cluster.coords[other].kill()
    for _ in range(3):
        assert await cluster.round(other) == pytest.approx(WHOLE)
    cluster.coords[other].start()
    await cluster.coords[other].until_ready()
    await cluster.until_shared()


async def test_shares_while_etcd_is_frozen_and_when_the_leader_dies_meanwhile(cluster: Cluster) -> None:
    first = await cluster.leader(0)
    assert first is not None
    cluster.etcd.freeze()
    for _ in range(3):
        # On a busy machine, a claim may not reach the leader in time.
        await cluster.until_shared()
    cluster.coords[first].kill()
    for _ in range(3):
        await cluster.round(first)
    cluster.etcd.thaw()
    cluster.coords[first].start()
    await cluster.coords[first].until_ready()
    await cluster.until_shared()
