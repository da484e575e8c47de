"""Room that calls of all tenants share: the wait for it is bounded. `ReadGate` has the tests of turns."""

from __future__ import annotations

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
