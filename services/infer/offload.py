"""Work that is usually short, but sometimes would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from mesh.rpc.heavy_work import HeavyWork, Steps
from shoal.oip.tensors import completed

T = TypeVar("T")


async def offload_if_long(work: Callable[[], T], is_long: bool) -> T:
    """Return the result of `work`, run on a thread when it is long, else directly."""
    return await asyncio.to_thread(work) if is_long else work()


async def in_turns(heavy: HeavyWork, tenant: str, steps: Steps[T], *, is_long: bool) -> T:
    """Return the result of `steps`: at once, unless they are long and wait for the turns of their tenant."""
    return await heavy.run(tenant.encode("latin-1", "replace"), steps) if is_long else completed(steps)
