"""Coord's leader has the store apply retention: with its token, again while there is more, and only while it leads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from shoal.coord.v1 import coord_pb2 as coord_pb
from shoal.store.v1 import store_pb2 as pb
from tests.breakable import until


class FakeStore:
    """Counts the tokens that come; answers as a test says."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.fails = 0
        self.more = 0

    async def apply(self, request: pb.ApplyRetentionRequest, context: Any) -> pb.ApplyRetentionResponse:
        self.tokens.append(request.token)
        if self.fails:
            self.fails -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants it")
        self.more = max(0, self.more - 1)
        return pb.ApplyRetentionResponse(results=1, more=self.more > 0)


@pytest.fixture
async def store(run_dir: Path) -> AsyncIterator[FakeStore]:
    fake = FakeStore()
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        fake.apply, pb.ApplyRetentionRequest.FromString, pb.ApplyRetentionResponse.SerializeToString
    )
    service = grpc.method_handlers_generic_handler("shoal.store.v1.StoreService", {"ApplyRetention": handler})
    server.add_generic_rpc_handlers([service])
    server.add_insecure_port(f"unix:{run_dir}/outbound.sock")
    await server.start()
    yield fake
    await server.stop(0)


async def test_the_leader_and_its_successor(
    coord: Callable, stub_of: Callable, store: FakeStore, run_dir: Path
) -> None:
    settings = {"MESH": f"unix:{run_dir}/outbound.sock", "RETENTION_MS": "100"}
    store.fails = 3
    first = coord(0, **settings)
    await until(lambda: len(store.tokens) >= 6, "the leader asks, and goes on after refusals")
    assert len(set(store.tokens)) == 1
    leader = await (await stub_of(first)).GetLeader(coord_pb.GetLeaderRequest())
    assert leader.fencing_token == store.tokens[0]
    second = coord(1, **settings)
    await second.until_ready()
    before = store.tokens[-1]
    first.kill()
    await until(lambda: store.tokens[-1] != before, "its successor asks")
    assert store.tokens[-1] > before
    assert sorted(store.tokens) == store.tokens


async def test_it_asks_again_at_once_while_there_is_more(coord: Callable, store: FakeStore, run_dir: Path) -> None:
    store.more = 20
    coord(0, MESH=f"unix:{run_dir}/outbound.sock", RETENTION_MS="86400000")
    await until(lambda: store.more == 0 and len(store.tokens) == 20, "all was asked for in one go")


async def test_without_a_mesh_it_leads_all_the_same(coord: Callable) -> None:
    alone = coord(0)
    await alone.until_ready()
