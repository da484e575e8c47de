"""Room that calls of all tenants share: the wait for it is bounded. `ReadGate` has the tests of turns."""

from __future__ import annotations

import asyncio

import pytest

from mesh.rpc.tenant_turns import TenantTurns
from shoal.errors import Unavailable


async def test_a_call_that_finds_no_room_in_time_is_unavailable_and_holds_none() -> None:
    turns = TenantTurns(2, leaves_room=True, wait_s=0.0)
    async with turns.take("a"):
        with pytest.raises(Unavailable, match="waited for its turn"):
            async with turns.take("a"):
                pass
        assert turns.held == 1
        async with turns.take("b"):
            assert turns.held == 2
    assert turns.held == 0
    async with turns.take("a"):
        assert turns.held == 1


async def test_a_call_that_does_not_wait_has_room_at_once_or_none() -> None:
    turns = TenantTurns(100, leaves_room=True)
    assert turns.try_admit("a", 60)
    assert not turns.try_admit("a", 20)
    assert turns.try_admit("b", 20)
    assert not turns.try_admit("c", 21)
    waiting = asyncio.ensure_future(turns.admit("a", 20))
    await asyncio.sleep(0)
    turns.release("b", 20)
    # Behind the one of its tenant that waits, though there is room for it.
    assert not turns.try_admit("a", 1)
    assert turns.try_admit("b", 1)
    assert (turns.held, turns.held_by("a"), turns.held_by("b")) == (61, 60, 1)
    turns.release("a", 60)
    await waiting
    assert (turns.held, turns.held_by("a")) == (21, 20)
    # More than everything is admitted alone.
    turns.release("a", 20)
    turns.release("b")
    assert turns.try_admit("a", 1_000)
    assert not turns.try_admit("b", 1)
