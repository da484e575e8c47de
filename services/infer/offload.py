"""Offload of work that is usually short, but sometimes would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def offload_if_long(work: Callable[[], T], is_long: bool) -> T:
    """Return the result of `work`, run on a thread when it is long, else directly."""
    return await asyncio.to_thread(work) if is_long else work()
