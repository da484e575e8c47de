"""Watch channel: one changing value; every follower sees the newest value, and no follower delays another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Watched(Generic[T]):
    """Holds one immutable value. Slow followers skip values that were replaced, so there is no queue to bound."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._changed = asyncio.Event()

    @property
    def value(self) -> T:
        return self._value

    def set(self, value: T) -> None:
        """Replace the value and wake the followers. An equal value changes nothing."""
        if value == self._value:
            return
        self._value = value
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, seen: T, timeout_s: float | None = None) -> T:
        """Wait until the value is not `seen`, at most `timeout_s`; return the newest value."""
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while self._value is seen:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                break
        return self._value

    async def follow(self) -> AsyncIterator[T]:
        """Yield the value now and after each change, for ever."""
        while True:
            changed, value = self._changed, self._value
            yield value
            await changed.wait()
