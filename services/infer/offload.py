"""Work that is mostly short, and sometimes would hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def offload_if_long(work: Callable[[], T], is_long: bool) -> T:
    """Does `work`: here when it is short, else on a thread."""
    return await asyncio.to_thread(work) if is_long else work()
