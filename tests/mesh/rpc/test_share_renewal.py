"""Claims of shares: two instances share a limit by demand, and calls go on while nobody answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from mesh.rpc import share_renewal
from mesh.rpc.access import Access
from mesh.rpc.client.channel import Channel
from mesh.rpc.held_shares import CallLimits, HeldShares, Reservation
from mesh.rpc.server import Rpc, Server
from mesh.rpc.share_renewal import ShareRenewal
from shoal.access import tokens
from shoal.access.limits import Kind
from shoal.access.tokens import Signer
from shoal.coord.v1 import shares_pb2 as pb
from shoal.coord.v1 import shares_pb2_grpc
from shoal.errors import LimitReached, Unavailable
from tests.access.policies import claims_of, key, passed, policy
from tests.breakable import until

MOST, MANY = 16, 100


class Coord(shares_pb2_grpc.ShareServiceServicer):
    """Divides a limit of MOST in flight equally among the claimants of a bucket."""

    def __init__(self) -> None:
        self.is_away = False
        self.claims: list[pb.ClaimSharesRequest] = []
        self.buckets: dict[str, set[bytes]] = {}

    async def ClaimShares(self, request: pb.ClaimSharesRequest, context: Any) -> pb.ClaimSharesResponse:
        if self.is_away:
            raise Unavailable("there is no leader")
        self.claims.append(request)
        self.buckets[request.claimant] = {claim.bucket.SerializeToString() for claim in request.claims}
        shares = [
            pb.GrantedShare(
                bucket=claim.bucket,
                amount=MOST // sum(claim.bucket.SerializeToString() in known for known in self.buckets.values()),
            )
            for claim in request.claims
        ]
        return pb.ClaimSharesResponse(shares=shares, renew_ms=100, lifetime_ms=500)


class Instance:
    """One instance that counts calls."""

    def __init__(self, signer: Signer, unrenewed: str) -> None:
        self.shares = HeldShares(tuple(Kind))
        limit = {"name": "all", "requests_in_flight": MOST, "unrenewed": unrenewed}
        self.access = Access(policy(signer, limits=[limit]), shares=self.shares)
        self._caller = passed(claims_of(key(signer)))[1].encode()
        self.held: list[Reservation] = []

    @property
    def limits(self) -> CallLimits:
        found = self.access.limits_of(self._caller, "m")
        assert found is not None
        return found

    def fill(self) -> int:
        """Begin calls until one is refused, or there are many; return how many are in flight."""
        while len(self.held) < MANY:
            try:
                self.held.append(self.limits.reserve(0, 1))
            except LimitReached:
                break
        return len(self.held)

    def end(self) -> None:
        while self.held:
            self.held.pop().end()


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return tokens.create_signer(tmp_path / "signer.json")


@pytest.fixture
async def coord() -> Coord:
    return Coord()


@pytest.fixture
async def start(coord: Coord, signer: Signer, run_dir: Path) -> AsyncIterator[Any]:
    """`await start(name)` starts an instance that claims its shares."""
    rpc = Rpc(
        pb.DESCRIPTOR.services_by_name["ShareService"],
        lambda to: shares_pb2_grpc.add_ShareServiceServicer_to_server(coord, to),
    )
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(Server(f"unix:{run_dir}/coord.sock", [rpc], drain_ms=100))

        async def begin(name: str, unrenewed: str = "keep") -> Instance:
            made = Instance(signer, unrenewed)
            channel = await stack.enter_async_context(Channel(server.address))
            await stack.enter_async_context(ShareRenewal(made.shares, channel, name))
            return made

        yield begin


async def test_two_instances_share_a_limit_and_what_one_releases_is_the_others(
    coord: Coord, start: Any, signer: Signer
) -> None:
    first, second = await start("local/infer-0"), await start("local/infer-1")
    # Nothing is claimed before a call.
    assert not coord.claims
    # A part of the limit, until coord has answered.
    assert first.fill() == MOST // 8
    await until(lambda: first.fill() == MOST, "the whole limit for the only claimant")
    assert second.fill() == MOST // 8
    await until(lambda: second.fill() == MOST // 2, "an equal share")
    # It was halved by the claim of the other, and what is in flight goes on.
    assert len(first.held) == MOST
    await until(lambda: filled(first) == MOST // 2, "the other half")
    first.end()
    second.end()
    # Without the limit, the next claim releases the share.
    first.access.set_policy(policy(signer))
    await until(lambda: second.fill() == MOST, "the share of the other")
    second.end()
    assert max(claim.demand for each in coord.claims for claim in each.claims) == MOST


@pytest.mark.parametrize(("unrenewed", "most"), [("keep", MOST), ("deny", 0), ("open", MANY)])
async def test_without_an_answer_the_policy_decides(
    coord: Coord, start: Any, unrenewed: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share_renewal, "_RETRY_S", 0.05)
    instance = await start("local/infer-0", unrenewed)
    await until(lambda: instance.fill() == MOST, "the whole limit")
    instance.end()
    coord.is_away = True
    if most == MOST:
        # Two lives of a share.
        await asyncio.sleep(1)
        assert instance.fill() == MOST
    else:
        await until(lambda: filled(instance) == most, "what the policy says")
    coord.is_away = False
    await until(lambda: filled(instance) == MOST, "the limit again")


def filled(instance: Instance) -> int:
    """Return how many calls can be in flight now."""
    instance.end()
    return instance.fill()
