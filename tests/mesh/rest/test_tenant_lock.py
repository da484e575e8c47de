"""A lock whose waiting tenants take turns."""

from __future__ import annotations

import asyncio

from mesh.rest.tenant_lock import TenantLock


async def test_tenants_take_turns_and_calls_of_one_tenant_are_in_order() -> None:
    lock, order = TenantLock(), []
    first = asyncio.Event()

    async def call(tenant: bytes, number: int) -> None:
        async with lock.held_by(tenant):
            order.append((tenant, number))
            if number == 0:
                await first.wait()
            await asyncio.sleep(0)

    names = [(b"a", 0), (b"a", 1), (b"a", 2), (b"a", 3), (b"b", 1), (b"c", 1), (b"b", 2)]
    calls = [asyncio.create_task(call(*name)) for name in names]
    await asyncio.sleep(0)
    first.set()
    await asyncio.gather(*calls)
    assert order == [(b"a", 0), (b"a", 1), (b"b", 1), (b"c", 1), (b"a", 2), (b"b", 2), (b"a", 3)]


async def test_a_cancelled_call_loses_no_turn_of_others() -> None:
    lock, done = TenantLock(), []

    async def call(name: str) -> None:
        async with lock.held_by(name[:1].encode()):
            await asyncio.sleep(0)
            done.append(name)

    for cancelled_after in range(6):
        calls = [asyncio.create_task(call(name)) for name in ("a1", "a2", "b1", "b2")]
        for _ in range(cancelled_after):
            await asyncio.sleep(0)
        # Waiting, with the lock just handed to it, or done.
        calls[1].cancel()
        calls[2].cancel()
        async with asyncio.timeout(30):
            await asyncio.gather(*calls, return_exceptions=True)
        assert {"a1", "b2"} <= {*done}
        done.clear()
    async with asyncio.timeout(30), lock.held_by(b"x"):
        pass
