"""Serialized messages, spoiled in the ways in which protobuf can be spoiled. Seeded: the same seed, the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(rng: random.Random, corpus: Sequence[bytes], most: int = 4) -> bytes:
    """One of `corpus` after one to `most` changes."""
    data = rng.choice(corpus)
    for _ in range(rng.randint(1, most)):
        data = rng.choice(_CHANGES)(rng, data, corpus)
    return data


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _at(rng: random.Random, data: bytes) -> int:
    return rng.randint(0, max(len(data) - 1, 0))


def _flip(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    if not data:
        return data
    at = _at(rng, data)
    return data[:at] + bytes([data[at] ^ 1 << rng.randint(0, 7)]) + data[at + 1 :]


def _set(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = _at(rng, data)
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randint(0, 255)))]) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    return data[: _at(rng, data)]


def _drop(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = _at(rng, data)
    return data[:at] + data[at + rng.randint(1, 8) :]


def _repeat(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    at = _at(rng, data)
    piece = data[at : at + rng.randint(1, 40)]
    return data[:at] + piece * rng.randint(2, 6) + data[at:]


def _edge(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A number at the end of its range in place of a byte: a length, a dimension, a tag."""
    at = _at(rng, data)
    return data[:at] + varint(rng.choice(_EDGES)) + data[at + 1 :]


def _field(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Another field at the end, known or not, of a length that may be a lie: later fields overrule earlier ones."""
    number, kind = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 500, 536_870_911)), rng.randint(0, 7)
    body = rng.randbytes(rng.choice((0, 1, 7, 60)))
    if kind == 2:
        length = rng.choice((len(body), len(body) + 1, 0, 1 << 31, (1 << 64) - 1))
        return data + varint(number << 3 | kind) + varint(length) + body
    return data + varint(number << 3 | kind) + body


def _merge(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Two messages after each other are one message, with the fields of both."""
    return data + rng.choice(corpus)


def _splice(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    other = rng.choice(corpus)
    return data[: _at(rng, data)] + other[_at(rng, other) :]


def _nest(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """The message as a field of itself, or groups in groups."""
    depth = rng.choice((1, 2, 150))
    if rng.random() < 0.5:
        return data + b"\x2b" * depth + b"\x2c" * depth
    for _ in range(depth):
        data = varint(rng.randint(4, 6) << 3 | 2) + varint(len(data)) + data
    return data


_CHANGES: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (
    _flip,
    _set,
    _cut,
    _drop,
    _repeat,
    _edge,
    _field,
    _merge,
    _splice,
    _nest,
)
