"""Job ids: ULIDs, 26 characters that sort by time of creation (https://github.com/ulid/spec).

     01JDG3W6ZK        Q1N8X9T4B7R2M5P0
    |----------|      |----------------|
     48 bits: ms       80 bits: random, in Crockford's base 32

Ids of one generator rise strictly, also within a millisecond and when the clock steps back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
_RANDOM_BITS = 80
_LOW_BITS = 60
_LOW = (1 << _LOW_BITS) - 1
_FORM = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


class Ulids:
    """Monotonic generator of ids. One per process; not thread-safe."""

    def __init__(self, now_ms: Callable[[], int], random: Callable[[int], bytes] = os.urandom) -> None:
        self._now_ms = now_ms
        self._random = random
        self._last = 0

    def new(self) -> str:
        """Return the next id. Within a millisecond the random part counts up; an overflow uses the next one."""
        now_ms = self._now_ms()
        if now_ms <= self._last >> _RANDOM_BITS:
            self._last += 1
        else:
            self._last = (now_ms << _RANDOM_BITS) | int.from_bytes(self._random(10), "big")
        return encode(self._last)


def encode(value: int) -> str:
    """Return the 26 characters of a 128-bit number."""
    # For speed, two characters at a time, and a cached front, which the ids of one millisecond share.
    low = value & _LOW
    return _front(value >> _LOW_BITS) + (
        _PAIRS[low >> 50]
        + _PAIRS[low >> 40 & 1023]
        + _PAIRS[low >> 30 & 1023]
        + _PAIRS[low >> 20 & 1023]
        + _PAIRS[low >> 10 & 1023]
        + _PAIRS[low & 1023]
    )


@lru_cache(4)
def _front(high: int) -> str:
    return "".join(_PAIRS[high >> shift & 1023] for shift in range(60, -1, -10))


def floor(time_ms: int) -> str:
    """Return the smallest id of a millisecond: lower ids were created earlier."""
    return encode(time_ms << _RANDOM_BITS)


def is_ulid(text: str) -> bool:
    """Return True when `text` has the form of an id, in the canonical upper case."""
    return _FORM.fullmatch(text) is not None
