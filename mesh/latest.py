"""A value that changes, and those who follow it: each sees the newest, none makes another wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Holds one immutable value. Slow followers skip what was replaced meanwhile: there is no queue to fill."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._changed = asyncio.Event()

    @property
    def value(self) -> T:
        return self._value

    def set(self, value: T) -> None:
        """Replaces the value and wakes the followers; the same value again wakes nobody."""
        if value == self._value:
            return
        self._value = value
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, seen: T, timeout_s: float | None = None) -> T:
        """The value as soon as it is another than `seen`, or as it is after `timeout_s`."""
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while self._value is seen:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                break
        return self._value

    async def follow(self) -> AsyncIterator[T]:
        """Yields the value as it is now, and then as it is after each change. Never ends."""
        while True:
            changed, value = self._changed, self._value
            yield value
            await changed.wait()
