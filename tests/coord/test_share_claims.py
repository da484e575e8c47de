"""Claims at a coord that does not lead go to the leader; without one, a coord divides the limits itself."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc
import pytest

from mesh.cluster.election import LEADER, candidate_key
from mesh.cluster.etcd import Entry
from mesh.cluster.membership import Instance, State, encode
from mesh.cluster.mirror import Copy
from mesh.process.watched import Watched
from mesh.rpc.access import Access
from mesh.rpc.channel import connect
from mesh.rpc.client.channel import Channel
from mesh.rpc.cluster_access import InForce
from mesh.rpc.held_shares import CallLimits, HeldShares, Reservation
from mesh.rpc.server import Rpc, Server
from mesh.rpc.share_messages import request_message, shares_in
from mesh.rpc.share_renewal import ShareRenewal
from services.coord import share_claims
from services.coord.share_claims import ShareClaims
from services.coord.share_rpc import ShareRpc
from services.coord.traffic import SHARES
from shoal.access import policy
from shoal.access.caller_header import value_of
from shoal.access.limits import Bucket, Kind
from shoal.coord.v1 import shares_pb2 as pb
from shoal.coord.v1 import shares_pb2_grpc
from shoal.errors import LimitReached, Unavailable
from tests.breakable import PATIENCE_S, until

ACME = Bucket("plan", Kind.IN_FLIGHT, "acme")
POLICY = policy.parse("""
version: 1
issuers: [{issuer: shoal, audiences: [shoal], token_prefix: shoal_, cluster: true}]
limits: [{name: plan, requests_in_flight: 10}]
""")


class Mirror:
    """Copy of a cluster with coords, the first of which leads."""

    copy = Copy(stale=False)

    def lead(self, *coords: Instance) -> None:
        value = json.dumps({"name": coords[0].name, "since": 1.0}).encode()
        entries = {candidate_key(LEADER, 1): Entry(candidate_key(LEADER, 1), value, 1, 1, 1)}
        entries |= {each.key: Entry(each.key, encode(each), 1, 1, 1) for each in coords}
        self.copy = Copy(entries, 1, stale=False)


class Coords:
    """Two coords that see the same cluster."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.mirror = Mirror()
        self._stack = stack
        self.instances = [
            Instance("coord", "local", f"coord-{n}", f"unix:{folder}/{n}.sock", n, State.READY, 1.0) for n in range(2)
        ]
        self.claims: list[ShareClaims] = []
        self.in_force = Watched(InForce(POLICY, 1, 1, is_known=True))
        self.servers: list[Server] = []

    async def start(self) -> None:
        for instance in self.instances:
            claims = ShareClaims(self.mirror, self.in_force, instance.name)  # type: ignore[arg-type]
            self.claims.append(await self._stack.enter_async_context(claims))
            servicer = ShareRpc(self.claims[-1])
            rpc = Rpc(SHARES, lambda s, one=servicer: shares_pb2_grpc.add_ShareServiceServicer_to_server(one, s))
            server = await self._stack.enter_async_context(Server(instance.address, [rpc], drain_ms=0))
            await server.serve()
            self.servers.append(server)
        self.mirror.lead(*self.instances)

    async def claim(self, at: int, claimant: str, demand: float = 10.0) -> float:
        return (await self.claims[at].claim(claimant, {ACME: demand}))[ACME].amount


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim waits for a leader that works on a busy machine. After its time, a coord divides by itself."""
    monkeypatch.setattr(share_claims, "_TIMEOUT_S", PATIENCE_S)


@pytest.fixture
async def coords() -> AsyncIterator[Coords]:
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    async with AsyncExitStack() as stack:
        made = Coords(folder, stack)
        await made.start()
        yield made
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.usefixtures("patient")
async def test_claimants_of_different_coords_share_a_limit(coords: Coords) -> None:
    assert await coords.claim(0, "local/infer-0") == 10
    assert await coords.claim(1, "local/infer-1") == 5
    assert await coords.claim(0, "local/infer-0") == 5


@pytest.mark.usefixtures("patient")
async def test_a_coord_that_reaches_no_leader_divides_by_itself(coords: Coords) -> None:
    gone = Instance("coord", "other", "coord-0", "unix:/nowhere.sock", 9, State.READY, 1.0)
    coords.mirror.lead(gone, *coords.instances)
    assert [await coords.claim(at, f"local/infer-{at}") for at in (0, 1)] == [10, 10]
    coords.mirror.lead(*coords.instances)
    await coords.claim(1, "local/infer-1")
    assert [await coords.claim(at, f"local/infer-{at}") for at in (0, 1)] == [5, 5]


async def test_a_claim_that_waits_for_a_former_leader_has_a_share_when_another_leads(
    coords: Coords, tmp_path: Path
) -> None:
    is_asked = asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_asked.set()

    async with await asyncio.start_unix_server(stall, tmp_path / "stalled.sock"):
        stalled = Instance("coord", "other", "coord-0", f"unix:{tmp_path}/stalled.sock", 9, State.READY, 1.0)
        coords.mirror.lead(stalled, *coords.instances)
        waiting = asyncio.create_task(coords.claim(1, "local/infer-0"))
        await asyncio.wait_for(is_asked.wait(), PATIENCE_S)
        coords.mirror.lead(*coords.instances)
        assert await coords.claim(1, "local/infer-1") == 10
        assert await waiting == 10


async def test_two_coords_that_take_each_other_for_the_leader_pass_no_claim_on_for_ever(coords: Coords) -> None:
    other = Mirror()
    other.lead(*reversed(coords.instances))
    coords.claims[0]._mirror = other  # type: ignore[assignment]
    assert await coords.claim(0, "local/infer-0") == 10


async def test_a_claim_over_the_wire_is_checked(coords: Coords) -> None:
    async with connect(coords.instances[0].address) as channel:
        stub = shares_pb2_grpc.ShareServiceStub(channel)
        response = await stub.ClaimShares(request_message("local/infer-0", {ACME: 3.0}, {}))
        assert (shares_in(response)[ACME].amount, response.renew_ms, response.lifetime_ms) == (10, 1000, 10_000)
        removed = Bucket("gone", Kind.IN_FLIGHT, "acme")
        assert not shares_in(await stub.ClaimShares(request_message("local/infer-0", {removed: 3.0}, {})))
        bucket = pb.LimitBucket(limit="plan", kind=pb.LIMIT_KIND_IN_FLIGHT, tenant="acme")
        unknown = pb.LimitBucket(limit="plan", tenant="acme")
        for request, text in (
            (pb.ClaimSharesRequest(), "claimant is missing"),
            (pb.ClaimSharesRequest(claimant="a", claims=[pb.ShareClaim(bucket=unknown)]), "no kind 0"),
            (
                pb.ClaimSharesRequest(claimant="a", claims=[pb.ShareClaim(bucket=bucket, demand=float("nan"))]),
                "demand: expected a number",
            ),
            (pb.ClaimSharesRequest(claimant="a", claims=[pb.ShareClaim(bucket=bucket, held=-1)]), "held: expected a n"),
            (pb.ClaimSharesRequest(claimant="a", claims=[pb.ShareClaim(bucket=bucket)] * 10_001), "10001 claims, of"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=text):
                await stub.ClaimShares(request)


async def test_without_a_known_policy_a_claim_is_repeated_later(coords: Coords) -> None:
    coords.in_force.set(InForce())
    with pytest.raises(Unavailable, match="does not know the policy yet"):
        await coords.claim(0, "local/infer-0")


async def test_the_calls_of_two_instances_share_a_limit(coords: Coords) -> None:
    caller = value_of({"iss": "shoal", "tenant": "acme", "sub": "ann", "role": "user", "jti": "k-1"})
    in_flight: list[list[Reservation]] = [[], []]
    counted: list[CallLimits] = []
    async with AsyncExitStack() as stack:
        for at, coord in enumerate(coords.instances):
            shares = HeldShares((Kind.IN_FLIGHT,))
            channel = await stack.enter_async_context(Channel(coord.address))
            await stack.enter_async_context(ShareRenewal(shares, channel, f"local/infer-{at}"))
            found = Access(POLICY, shares=shares).limits_of(caller, "m")
            assert found is not None
            counted.append(found)

        def fill(at: int) -> int:
            """Begin calls at an instance until one is refused; return how many are in flight there."""
            with suppress(LimitReached):
                while len(in_flight[at]) < 100:
                    in_flight[at].append(counted[at].reserve(0, 1))
            return len(in_flight[at])

        def filled(at: int) -> int:
            while in_flight[at]:
                in_flight[at].pop().end()
            return fill(at)

        await until(lambda: fill(0) + fill(1) >= 10, "the whole limit")
        # A newcomer's share came on top, until the next claim of the other.
        await until(lambda: [filled(0), filled(1)] == [5, 5], "equal shares")
        while in_flight[1]:
            in_flight[1].pop().end()
        # One instance has calls, and the other has none.
        await until(lambda: filled(0) >= 9, "the unused part of the other's share")
